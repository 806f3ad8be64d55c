"""The residual of one row, for decoding token by token on a CPU.

For one row the calls cost more than the arithmetic, and so does a dispatched operator of our own: numpy, whose calls
are light, runs the same FFTs as `operator` on the memory of the tensors.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.fourier.rfft_positions import Places

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[Any]


class Route(NamedTuple):
    """How one row of x reaches one row of y, coefficients in the order of their bins of y.

    Attributes:
        order: [K] of the coefficients.
        source: [K] bins of x.
        factors: [K, 2] of the real and the imaginary parts.
        target: [U] bins of y, all different.
        starts: [U] the first coefficient of each.
    """

    order: Numbers
    source: Numbers
    factors: Floats
    target: Numbers
    starts: Numbers


_ROUTES: dict[int, Route] = {}  # by the identity of the indices of places, while they live


def route_of(places: Places) -> Route:
    """The way of a row, made at the first call and kept as long as the places, which are on a CPU."""
    key = id(places.indices)
    if key not in _ROUTES:
        order, source, row = places.indices[:3].numpy()
        target, starts = np.unique(row, return_index=True)
        _ROUTES[key] = Route(order, source, places.factors[0].numpy(), target, starts)
        weakref.finalize(places.indices, _ROUTES.pop, key)
    return _ROUTES[key]


def row_residual(x: Tensor, coefficients: Tensor, places: Places, out_features: int, scale: float) -> Tensor | None:
    """The residual x ΔWᵀ of one row: [O] float32; None where a tensor has no memory of its own, as under torch.vmap.

    ``x`` is [..., I] of I elements on a CPU, any float dtype but float64; ``coefficients`` is [K] float, there too.
    """
    try:
        row = x.detach().float().numpy().reshape(-1)
        values = coefficients.detach().float().numpy()
    except RuntimeError:
        return None
    route = route_of(places)
    weights = values.take(route.order)[:, None] * route.factors
    weights *= np.float32(scale)
    taken = np.fft.rfft(row).astype(np.complex64, copy=False).take(route.source)
    parts = taken.view(np.float32).reshape(-1, 2)
    parts *= weights
    bins = np.zeros(out_features // 2 + 1, np.complex64)
    bins[route.target] = np.add.reduceat(taken, route.starts)
    return torch.from_numpy(np.fft.irfft(bins, out_features, norm="forward").astype(np.float32, copy=False))
