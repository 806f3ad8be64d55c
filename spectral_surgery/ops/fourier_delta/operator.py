"""The residual by real FFTs of the activations: no [O, I] array, a few rows at a time.

Source: the definition in `reference`, with the inverse transforms of ΔW moved to x and y.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_surgery.ops.fourier_delta import short_dft
from spectral_surgery.ops.fourier_delta.mix import dot, mix
from spectral_surgery.ops.fourier_delta.places import Delta, factor

_ROWS, _BLOCK = 128, 1 << 18  # of activations transformed at a time on a CPU, to stay in its cache; less for many K
_SHORT_FACTOR = 256  # the tables of a length with a larger factor would be large


class Route(NamedTuple):
    """How the bins of what comes in reach those of what goes out.

    Attributes:
        order: [K] int64, the coefficients; None when they are in their own order.
        source: [K] int64, bins of what comes in.
        target: [K] int64, bins of what goes out.
        factors: [K, 2].
        length: features that go out.
    """

    order: Tensor | None
    source: Tensor
    target: Tensor
    factors: Tensor
    length: int


def precision(x: Tensor) -> torch.dtype:
    """In which activations are transformed: float64 stays, all others take float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def add_forward(y: Tensor, x: Tensor, delta: Delta) -> None:
    """Add x ΔWᵀ in place.

    Args:
        y: [T, O], any float dtype.
        x: [T, I], any float dtype.
        delta: the update.
    """
    indices, factors = delta.places
    if _is_short(x, delta):
        route = Route(None, indices[6], indices[7], factors[2], delta.shape[0])
    else:
        route = Route(indices[0], indices[1], indices[2], factors[0], delta.shape[0])
    weights = _weights(route, delta, x)
    for rows in _blocks(x, delta):
        _add(y[rows], _analysis(x[rows], route), route, weights, delta)


def add_backward(dx: Tensor | None, x: Tensor | None, dy: Tensor, delta: Delta) -> Tensor | None:
    """Add dy ΔW in place, and find the gradient of the coefficients; both from one spectrum of dy.

    Args:
        dx: [T, I]; None when it is not wanted.
        x: [T, I]; None when the gradient of the coefficients is not wanted.
        dy: [T, O].
        delta: the update.

    Returns:
        [K] in the precision of dy, or None.
    """
    indices, factors = delta.places
    if _is_short(dy, delta):
        route = Route(None, indices[7], indices[6], factors[2], delta.shape[1])
    else:
        route = Route(indices[3], indices[4], indices[5], factors[1], delta.shape[1])
    weights = _weights(route, delta, dy)
    sums = torch.zeros_like(weights)
    for rows in _blocks(dy, delta):
        spectrum = _analysis(dy[rows], route)
        if x is not None:
            sums += dot(spectrum, route.source, _analysis(x[rows], route), route.target)
        if dx is not None:
            _add(dx[rows], spectrum, route, weights, delta)
    if x is None:
        return None
    gradient = (sums * route.factors.sign()).sum(-1) * delta.scale
    return gradient if route.order is None else torch.empty_like(gradient).index_copy_(0, route.order, gradient)


def _weights(route: Route, delta: Delta, x: Tensor) -> Tensor:
    coefficients = delta.coefficients if route.order is None else delta.coefficients.take(route.order)
    return coefficients.to(precision(x)).unsqueeze(1) * route.factors


def _is_short(x: Tensor, delta: Delta) -> bool:
    return len(x) == 1 and not x.is_cuda and max(factor(n) for n in delta.shape) <= _SHORT_FACTOR


def _blocks(x: Tensor, delta: Delta) -> Iterator[slice]:
    size = len(x) or 1 if x.is_cuda else max(8, min(_ROWS, _BLOCK // len(delta.coefficients)))
    return (slice(start, start + size) for start in range(0, len(x), size))


def _analysis(x: Tensor, route: Route) -> Tensor:
    x = x.to(precision(x))
    return short_dft.spectrum(x) if route.order is None else torch.fft.rfft(x)


def _add(out: Tensor, spectrum: Tensor, route: Route, weights: Tensor, delta: Delta) -> None:
    length = route.length
    if route.order is None:
        bins = mix(spectrum, route.source, route.target, weights, short_dft.bins(length))
        residual = short_dft.real_sum(bins, length, weights.dtype)
    else:
        bins = mix(spectrum, route.source, route.target, weights, length // 2 + 1)
        residual = torch.fft.irfft(bins, n=length, norm="forward")
    out.add_(residual, alpha=delta.scale)
