"""How close stored bits come to the entropy of the codes, and how fast codes decode."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.timing import interleaved
from benchmarks.weights import linear_weights
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.frame_bytes import decode_frame
from spectral_surgery.codec.parallel import one_torch_thread
from spectral_surgery.codec.rate import Target

RATES = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
OVERHEAD = 1.005
_SIZE = 4096


def run(quick: bool) -> list[Row]:
    """Overhead on the real weights, and decode speed on a large Gaussian matrix."""
    rows = [overhead(linear_weights(), rate) for rate in RATES]
    size = _SIZE // 4 if quick else _SIZE
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    targets = [*(Target("bits", rate) for rate in RATES), Target("density", 0.2)]
    return rows + [decode_speed(matrix, target) for target in targets]


def overhead(weights: Mapping[str, Tensor], bits: float) -> Row:
    """Stored bits, everything counted, over the entropy of the codes of each matrix, given the words of the lattice."""
    stored = information = count = 0.0
    for name, weight in weights.items():
        encoded, report = encode(weight, Target("bits", bits), threads=2)
        spectrum = encoded.decode()
        error = float((spectrum.to_dense() - weight).norm() / weight.norm())
        require(abs(error - report.relative_error) < 1e-3 * error, f"{name}: error {error} where {report} is reported")
        stored += 8 * encoded.stored_bytes
        information += information_of(spectrum.codes.numpy())
        count += weight.numel()
    ratio = stored / information
    return {
        "bits asked": bits,
        "stored bits": stored / count,
        "entropy": information / count,
        "stored / entropy": ratio,
        "target": f"<= {OVERHEAD}",
        "met": ratio <= OVERHEAD,
    }


def decode_speed(matrix: Tensor, target: Target) -> Row:
    """Symbols per second from frames to integer codes, on one thread."""
    encoded, report = encode(matrix, target, threads=2)
    require(abs(_error(encoded, matrix) - report.relative_error) < 1e-4, "the decoded matrix is not what was measured")
    shapes = [tuple(encoded.codes(frame).shape) for frame in range(len(encoded.frames))]

    def decode() -> None:
        for frame, (rows, columns) in zip(encoded.frames, shapes, strict=True):
            decode_frame(frame, (rows, columns))

    with one_torch_thread():
        timing = interleaved({"decode": decode}, 9)["decode"]
    speed = matrix.numel() / timing.median / 1e9
    return {
        "codes at": f"{target.kind} {target.value:g}",
        "Gsym/s per core": speed,
        "p20": matrix.numel() / timing.p80 / 1e9,
        "p80": matrix.numel() / timing.p20 / 1e9,
    }


def information_of(codes: npt.NDArray[np.integer]) -> float:
    """Bits of codes [O, I]: the words, and the entropy of m given c, and parity in row 31 of each block."""
    whole = len(codes) // 32 * 32
    blocks = codes[:whole].astype(np.int64).reshape(-1, 32, codes.shape[1])
    m, c = blocks >> 1, blocks & 1
    odd = m[:, :31].sum(1) & 1
    if ((odd + m[:, 31]) & 1).any():  # no points of the lattice
        return _entropy(codes) * codes.size
    bits = 6.0 * blocks.shape[0] * blocks.shape[2]
    for one in (0, 1):
        inner, last = c[:, :31] == one, c[:, 31] == one
        bits += _entropy(m[:, :31][inner]) * inner.sum()
        bits += sum(_entropy(m[:, 31][last & (odd == known)]) * (last & (odd == known)).sum() for known in (0, 1))
    if whole < len(codes):  # a word for the rows that are left, and no parity
        rest = codes[whole:].astype(np.int64)
        bits += (1 + (len(rest) - 1).bit_length()) * codes.shape[1]
        bits += sum(_entropy(rest[rest & 1 == one] >> 1) * (rest & 1 == one).sum() for one in (0, 1))
    return float(bits)


def _entropy(symbols: npt.NDArray[np.integer]) -> float:
    p = np.unique(symbols, return_counts=True)[1] / max(symbols.size, 1)
    return float(-(p * np.log2(p)).sum())


def _error(encoded: EncodedSpectrum, matrix: Tensor) -> float:
    return float((encoded.to_dense() - matrix).norm() / matrix.norm())
