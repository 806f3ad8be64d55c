"""The residual by real FFTs of the activations: no [O, I] array, some rows at a time.

Source: the definition in `reference`, with the inverse transforms of ΔW moved to x and y.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_surgery.fourier.gather_scatter import mix, take
from spectral_surgery.fourier.rfft_positions import Delta

_BLOCK = 1 << 19  # numbers that are transformed at a time on a CPU, to stay in its cache


def add_forward(y: Tensor, x: Tensor, delta: Delta) -> None:
    """Add x ΔWᵀ in place. ``y`` is [T, O], any float dtype; ``x`` is [T, I], any float dtype."""
    for rows in _blocks(x, delta):
        _add(y[rows], mix(_spectrum(x[rows]), delta, 0, delta.shape[0] // 2 + 1))


def add_backward(dx: Tensor | None, x: Tensor | None, dy: Tensor, delta: Delta) -> Tensor | None:
    """Add dy ΔW in place, and find the gradient of the coefficients; both from one spectrum of dy.

    Returns [K] in the precision of the transforms, or None.

    Args:
        dx: [T, I]; None when it is not wanted.
        x: [T, I]; None when the gradient of the coefficients is not wanted.
        dy: [T, O].
    """
    if dx is None and x is None:
        return None
    order, source, target = delta.places.indices[3:6]
    factors, bins = delta.places.factors[1], delta.shape[1] // 2 + 1
    sums = torch.zeros_like(factors, dtype=_precision(dy))
    for rows in _blocks(dy, delta):
        spectrum = _spectrum(dy[rows])
        taken = None if x is None else take(spectrum, source)  # [t, K]
        if x is not None and taken is not None:
            products = torch.view_as_real(take(_spectrum(x[rows]), target))
            sums += products.mul_(torch.view_as_real(taken)).sum(0)
        if dx is not None:
            _add(dx[rows], mix(spectrum, delta, 1, bins, taken))
    if x is None:
        return None
    gradient = (sums * factors.sign()).sum(-1) * delta.scale
    return torch.empty_like(gradient).index_copy_(0, order, gradient)


def _blocks(x: Tensor, delta: Delta) -> Iterator[slice]:
    widest = max(*delta.shape, 2 * len(delta.coefficients))
    size = max(1, len(x) if x.is_cuda else _BLOCK // widest)
    return (slice(start, start + size) for start in range(0, len(x), size))


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spectrum(x: Tensor) -> Tensor:
    spectrum: Tensor = torch.fft.rfft(x.to(_precision(x)))
    return spectrum


def _add(out: Tensor, mixed: Tensor) -> None:
    out.add_(torch.fft.irfft(mixed, n=out.shape[1], norm="forward"))
