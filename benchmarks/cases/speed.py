"""Speed of encoding and decoding one large matrix, beside naive pipelines in the same run."""

from __future__ import annotations

import numpy as np
import torch
import zstandard
from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.timing import interleaved
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.quantizers import QUANTIZERS
from spectral_surgery.codec.rate import Target
from spectral_surgery.transforms import TRANSFORMS, tiles

TARGETS = (Target("bits", 4.0), Target("bits", 3.0), Target("bits", 2.0), Target("density", 0.2))
BOTH = [(target, name) for target in TARGETS for name in QUANTIZERS if name == "scalar" or target.kind == "bits"]
ENCODE, DECODE = 25.0, 40.0  # M weights/s
THREADS = 2


def run(quick: bool) -> list[Row]:
    """M weights per second, encoding with verification, and decoding; two threads, float32."""
    size = 1024 if quick else 4096
    matrix = 0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    encoded = {(t, name): encode(matrix, t, quantizer=name, threads=THREADS) for t, name in BOTH}
    for spectrum, report in encoded.values():
        error = float((spectrum.to_dense() - matrix).norm() / matrix.norm())
        require(abs(error - report.relative_error) < 1e-3 * error, f"error {error} where {report} is reported")
    encoders = {
        f"encode, {name}, {t.kind} {t.value:g}": lambda t=t, name=name: encode(
            matrix, t, quantizer=name, threads=THREADS
        )
        for t, name in BOTH
    }
    decoders = {
        f"decode, {name}, {t.kind} {t.value:g}": lambda s=spectrum: s.to_dense(threads=THREADS)
        for (t, name), (spectrum, _) in encoded.items()
    }
    naive = {
        "naive: tile DCT, round, zstd (3 bits, no rate search, no check)": lambda: naive_pipeline(matrix),
        "naive: fft2, top 20 % (nothing stored)": lambda: fft_top(matrix, 0.2),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        timings = interleaved({**encoders, **decoders, **naive}, 5)
    finally:
        torch.set_num_threads(before)
    rows: list[Row] = []
    for name, timing in timings.items():
        limit = ENCODE if name in encoders else DECODE if name in decoders else None
        speed = matrix.numel() / timing.median / 1e6
        rows.append(
            {
                "what": name,
                "M weights/s": speed,
                "p20": matrix.numel() / timing.p80 / 1e6,
                "p80": matrix.numel() / timing.p20 / 1e6,
                "target": f">= {limit:g}" if limit else "",
                "met": speed >= limit if limit else "",
            }
        )
    return rows


def naive_pipeline(matrix: Tensor) -> bytes:
    """The straightforward pipeline: whole-matrix tile DCT, numpy rounding to int8, one zstd frame."""
    spectrum = tiles.forward(matrix, TRANSFORMS["dct"], 64, (0, 1)).numpy()
    step = 0.5 * float(np.sqrt(np.mean(spectrum**2)))
    codes = (np.sign(spectrum) * np.floor(np.abs(spectrum) / step + 0.4)).astype(np.int8)
    return zstandard.ZstdCompressor(level=1).compress(codes.tobytes())


def fft_top(matrix: Tensor, density: float) -> Tensor:
    """Largest coefficients of the full complex FFT, as FFT-Tensor keeps them (values and positions, not stored)."""
    spectrum = torch.fft.fftn(matrix).reshape(-1)
    return torch.topk(spectrum.abs(), max(1, int(spectrum.numel() * density))).indices
