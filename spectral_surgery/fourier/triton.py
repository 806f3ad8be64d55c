"""Gather, multiply and scatter in one Triton kernel, without atomics: every program sums what its bins receive."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_ROWS, _BINS = 4, 64  # of a program


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def mix(spectrum: Tensor, source: Tensor, target: Tensor, weights: Tensor, bins: int) -> Tensor:
    """The same as `gather_scatter.mix`: [T, bins] complex.

    Args:
        spectrum: [T, F] complex64 or complex128.
        source: [K] int64.
        target: [K] int64, increasing.
        weights: [K, 2] in the precision of the spectrum.
    """
    rows = len(spectrum)
    out = torch.empty(rows, bins, dtype=spectrum.dtype, device=spectrum.device)
    starts = torch.searchsorted(target, torch.arange(bins + 1, device=target.device))  # bin f has f's start to the next
    grid = (-(-rows // _ROWS), -(-bins // _BINS))
    arrays = (torch.view_as_real(spectrum.contiguous()), torch.view_as_real(out), source, starts, weights.contiguous())
    if rows:
        _kernel()[grid](*arrays, rows, spectrum.shape[1], bins, ROWS=_ROWS, BINS=_BINS)
    return out


@lru_cache(maxsize=1)
def _kernel() -> Any:
    triton, tl = import_module("triton"), import_module("triton.language")

    def mix_bins(spectrum, out, source, starts, weights, rows, width, bins, ROWS: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]  # noqa: ANN001, ANN202, N803, PLR0917
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

    mix_bins.__globals__["tl"] = tl  # where Triton's interpreter looks for its language
    return triton.jit(mix_bins)
