"""From the bins of one spectrum to those of another: gather, multiply, scatter.

On a GPU one Triton kernel does the three; everywhere else, and where Triton is missing, operators of torch.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from spectral_surgery import gpu
from spectral_surgery.fourier.rfft_positions import Delta


def take(spectrum: Tensor, source: Tensor) -> Tensor:
    """Bins of every row: [T, K] complex. ``spectrum`` is [T, F] complex; ``source`` is [K] int64."""
    return spectrum.gather(1, source.expand(len(spectrum), -1))


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Values times weights, in place.

    Args:
        values: [T, K] complex; overwritten.
        weights: [K, 2] real factors of the real and the imaginary parts.
    """
    torch.view_as_real(values).mul_(weights)
    return values


def scatter(values: Tensor, target: Tensor, bins: int, room: Tensor | None = None) -> Tensor:
    """Sums of values by bin: [T, F] complex.

    Args:
        values: [T, K] complex.
        target: [K] int64, the bin each is added to.
        room: [T, F'] complex, not needed any more; overwritten and returned where it has the shape.
    """
    sums = values.new_zeros(len(values), bins) if room is None or room.shape[1] != bins else room.zero_()
    if values.is_cuda:  # has no scatter_add of complex numbers
        return sums.index_add_(1, target, values)
    return sums.scatter_add_(1, target.expand(len(values), -1), values)


def mix(spectrum: Tensor, delta: Delta, way: int, bins: int, taken: Tensor | None = None) -> Tensor:
    """What the coefficients make of a spectrum, scaled: [T, bins] complex.

    Args:
        spectrum: [T, F] complex; may be overwritten.
        way: 0 from x to y, 1 from dy to dx, as in `Places`.
        taken: [T, K], the bins of each coefficient if somebody took them; may be overwritten.
    """
    if spectrum.is_cuda and gpu.available():
        return mix_on_gpu(spectrum, delta, way, bins)
    order, source, target = delta.places.indices[3 * way : 3 * way + 3]
    factors = delta.places.factors[way].to(spectrum.real.dtype) * delta.scale
    weights = delta.coefficients.take(order).to(factors.dtype).unsqueeze(1) * factors  # [K, 2]
    return scatter(weighted(take(spectrum, source) if taken is None else taken, weights), target, bins, spectrum)


def mix_on_gpu(spectrum: Tensor, delta: Delta, way: int, bins: int) -> Tensor:
    """The same as `mix` in one kernel; the spectrum stays as it is."""
    from spectral_surgery.gpu.mix_bins import BINS, ROWS, mix_bins

    (order, source, target), coefficients = delta.places.indices[3 * way : 3 * way + 3], delta.coefficients.contiguous()
    rows, count = len(spectrum), len(coefficients)
    out = torch.empty(rows, bins, dtype=spectrum.dtype, device=spectrum.device)
    arrays = (torch.view_as_real(spectrum.contiguous()), torch.view_as_real(out), source, target, order)
    if rows:
        with torch.cuda.device(spectrum.device) if spectrum.is_cuda else nullcontext():
            mix_bins[-(-rows // ROWS), -(-bins // BINS)](
                *(*arrays, delta.places.factors[way], coefficients, delta.scale),
                *(rows, spectrum.shape[1], bins, count, ROWS, BINS, count.bit_length()),
            )
    return out
