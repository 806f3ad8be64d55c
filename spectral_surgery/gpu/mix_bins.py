# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""Gather, multiply and scatter in one kernel, without atomics: every program sums what its bins receive."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS, BINS = 4, 64  # of a program


@triton.jit
def mix_bins(spectrum, out, source, target, order, factors, coefficients, scale, rows, width, bins, count, ROWS: tl.constexpr, BINS: tl.constexpr, HALVINGS: tl.constexpr):  # fmt: skip  # noqa: E501
    """Sums of weighted bins.

    Args:
        spectrum: [rows, width, 2] float32 or float64.
        out: [rows, bins, 2], the same.
        source: [count] int64, bins to take.
        target: [count] int64, increasing: where to add them.
        order: [count] int64, which coefficient is the weight of each, times scale.
        factors: [count, 2] float32, of the real and the imaginary parts.
        HALVINGS: 2 to this power is more than count.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bin_out = tl.program_id(1) * BINS + tl.arange(0, BINS)
    start = _first_of(bin_out, target, count, HALVINGS)
    stop = _first_of(bin_out + 1, target, count, HALVINGS)
    real = tl.zeros((ROWS, BINS), out.dtype.element_ty)
    imaginary = tl.zeros((ROWS, BINS), out.dtype.element_ty)
    for number in range(tl.max(stop - start, 0)):
        at = start + number
        live = at < stop
        bin_in = tl.load(source + at, mask=live, other=0)
        weight = tl.load(coefficients + tl.load(order + at, mask=live, other=0), mask=live, other=0.0)
        weight = weight.to(real.dtype) * scale
        of_real = weight * tl.load(factors + 2 * at, mask=live, other=0.0)
        of_imaginary = weight * tl.load(factors + 2 * at + 1, mask=live, other=0.0)
        value = spectrum + (row[:, None].to(tl.int64) * width + bin_in[None, :]) * 2
        mask = (row < rows)[:, None] & live[None, :]
        real += tl.load(value, mask=mask, other=0.0) * of_real[None, :]
        imaginary += tl.load(value + 1, mask=mask, other=0.0) * of_imaginary[None, :]
    to = (row[:, None].to(tl.int64) * bins + bin_out[None, :]) * 2
    mask = (row < rows)[:, None] & (bin_out < bins)[None, :]
    tl.store(out + to, real, mask=mask)
    tl.store(out + to + 1, imaginary, mask=mask)


@triton.jit
def _first_of(bins, target, count, HALVINGS: tl.constexpr):
    """How many targets are less than each bin."""
    found = bins * 0
    for step in tl.static_range(HALVINGS):
        further = found + (1 << (HALVINGS - 1 - step))
        inside = further <= count
        less = inside & (tl.load(target + further - 1, mask=inside, other=0) < bins)
        found = tl.where(less, further, found)
    return found
