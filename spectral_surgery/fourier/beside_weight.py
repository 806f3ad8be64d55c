"""The residual by real FFTs of the activations: no [O, I] array, some rows at a time.

Source: the definition in `reference`, with the inverse transforms of ΔW moved to x and y.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_surgery.fourier.gather_scatter import mix, scatter, take, weighted
from spectral_surgery.fourier.rfft_positions import Delta

_BLOCK = 1 << 19  # numbers that are transformed at a time on a CPU, to stay in its cache


class Route(NamedTuple):
    """How the bins of what comes in reach those of what goes out.

    Attributes:
        order: [K] int64, of the coefficients.
        source: [K] int64, bins of what comes in.
        target: [K] int64, bins of what goes out.
        factors: [K, 2] of the real and the imaginary parts.
        weights: [K, 2] the same with the coefficients.
        length: features that go out.
    """

    order: Tensor
    source: Tensor
    target: Tensor
    factors: Tensor
    weights: Tensor
    length: int


def add_forward(y: Tensor, x: Tensor, delta: Delta) -> None:
    """Add x ΔWᵀ in place. ``y`` is [T, O], any float dtype; ``x`` is [T, I], any float dtype."""
    route = _route(delta, x, 0)
    for rows in _blocks(x, delta):
        _add(y[rows], _spectrum(x[rows]), route, delta.scale)


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
    route = _route(delta, dy, 1)
    sums = torch.zeros_like(route.weights)
    for rows in _blocks(dy, delta):
        spectrum = _spectrum(dy[rows])
        taken = None if x is None else take(spectrum, route.source)  # [t, K]
        if x is not None and taken is not None:
            products = torch.view_as_real(take(_spectrum(x[rows]), route.target))
            sums += products.mul_(torch.view_as_real(taken)).sum(0)
        if dx is not None:
            _add(dx[rows], spectrum, route, delta.scale, taken)
    if x is None:
        return None
    gradient = (sums * route.factors.sign()).sum(-1) * delta.scale
    return torch.empty_like(gradient).index_copy_(0, route.order, gradient)


def _route(delta: Delta, x: Tensor, way: int) -> Route:
    order, source, target = delta.places.indices[3 * way : 3 * way + 3].unbind()
    factors = delta.places.factors[way]
    weights = delta.coefficients.take(order).to(_precision(x)).unsqueeze(1) * factors
    return Route(order, source, target, factors, weights, delta.shape[way])


def _blocks(x: Tensor, delta: Delta) -> Iterator[slice]:
    widest = max(*delta.shape, 2 * len(delta.coefficients))
    size = max(1, len(x) if x.is_cuda else _BLOCK // widest)
    return (slice(start, start + size) for start in range(0, len(x), size))


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spectrum(x: Tensor) -> Tensor:
    spectrum: Tensor = torch.fft.rfft(x.to(_precision(x)))
    return spectrum


def _add(out: Tensor, spectrum: Tensor, route: Route, scale: float, taken: Tensor | None = None) -> None:
    bins = route.length // 2 + 1
    if taken is None:
        mixed = mix(spectrum, route.source, route.target, route.weights, bins)
    else:
        mixed = scatter(weighted(taken, route.weights), route.target, bins, spectrum)
    out.add_(torch.fft.irfft(mixed, n=route.length, norm="forward"), alpha=scale)
