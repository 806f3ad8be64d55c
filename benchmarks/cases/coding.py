"""How close stored bits come to the entropy of the codes, and how fast codes decode."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.timing import interleaved
from benchmarks.weights import linear_weights
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.frame_bytes import decode_frame, entropy
from spectral_surgery.codec.parallel import one_torch_thread
from spectral_surgery.codec.rate import Target

RATES = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
OVERHEAD, SPEED = 1.03, 1.0
_SIZE = 4096


def run(quick: bool) -> list[Row]:
    """Overhead on the real weights, and decode speed on a large Gaussian matrix."""
    rows = [overhead(linear_weights(), rate) for rate in RATES]
    size = _SIZE // 4 if quick else _SIZE
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    targets = [*(Target("bits", rate) for rate in RATES), Target("density", 0.2)]
    return rows + [decode_speed(matrix, target) for target in targets]


def overhead(weights: Mapping[str, Tensor], bits: float) -> Row:
    """Stored bits, everything counted, over the order-0 entropy of the codes of each matrix."""
    stored = information = count = 0.0
    for name, weight in weights.items():
        encoded, report = encode(weight, Target("bits", bits), threads=2)
        spectrum = encoded.decode()
        error = float((spectrum.to_dense() - weight).norm() / weight.norm())
        require(abs(error - report.relative_error) < 1e-3 * error, f"{name}: error {error} where {report} is reported")
        stored += 8 * encoded.stored_bytes
        information += entropy(spectrum.codes.reshape(-1).numpy()) * weight.numel()
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
    counts = [encoded.codes(frame).numel() for frame in range(len(encoded.frames))]

    def decode() -> None:
        for frame, count in zip(encoded.frames, counts, strict=True):
            decode_frame(frame, count)

    with one_torch_thread():
        timing = interleaved({"decode": decode}, 9)["decode"]
    speed = matrix.numel() / timing.median / 1e9
    return {
        "codes at": f"{target.kind} {target.value:g}",
        "Gsym/s per core": speed,
        "p20": matrix.numel() / timing.p80 / 1e9,
        "p80": matrix.numel() / timing.p20 / 1e9,
        "target": f">= {SPEED:g}",
        "met": speed >= SPEED,
    }


def _error(encoded: EncodedSpectrum, matrix: Tensor) -> float:
    return float((encoded.to_dense() - matrix).norm() / matrix.norm())
