# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, N803, PLR0917
"""Gather, multiply and scatter in one kernel, without atomics: every program sums what its bins receive."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS, BINS = 4, 64  # of a program


@triton.jit
def mix_bins(spectrum, out, source, starts, weights, rows, width, bins, ROWS: tl.constexpr, BINS: tl.constexpr):
    """Sums of weighted bins.

    Args:
        spectrum: [rows, width, 2] float32 or float64.
        out: [rows, bins, 2], the same.
        source: [K] int64 bins to take.
        starts: [bins + 1] int64; bin f gets those from f's start to the next.
        weights: [K, 2] of the real and the imaginary parts.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bin_out = tl.program_id(1) * BINS + tl.arange(0, BINS)
    start = tl.load(starts + bin_out, mask=bin_out < bins, other=0)
    count = tl.load(starts + bin_out + 1, mask=bin_out < bins, other=0) - start
    real = tl.zeros((ROWS, BINS), out.dtype.element_ty)
    imaginary = tl.zeros((ROWS, BINS), out.dtype.element_ty)
    for number in range(tl.max(count, 0)):
        live = number < count
        bin_in = tl.load(source + start + number, mask=live, other=0)
        at = (row[:, None].to(tl.int64) * width + bin_in[None, :]) * 2
        mask = (row < rows)[:, None] & live[None, :]
        weight = weights + (start + number) * 2
        real += tl.load(spectrum + at, mask=mask, other=0.0) * tl.load(weight, mask=live, other=0.0)[None, :]
        imaginary += (
            tl.load(spectrum + at + 1, mask=mask, other=0.0) * tl.load(weight + 1, mask=live, other=0.0)[None, :]
        )
    to = (row[:, None].to(tl.int64) * bins + bin_out[None, :]) * 2
    mask = (row < rows)[:, None] & (bin_out < bins)[None, :]
    tl.store(out + to, real, mask=mask)
    tl.store(out + to + 1, imaginary, mask=mask)
