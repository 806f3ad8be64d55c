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

from spectral_surgery.ops.fourier_delta.places import Places

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
        length: O.
    """

    order: Numbers
    source: Numbers
    factors: Floats
    target: Numbers
    starts: Numbers
    length: int


_ROUTES: dict[int, Route] = {}  # by the identity of the indices of places, while they live


def arrays(*tensors: Tensor) -> tuple[Floats, ...] | None:
    """Tensors as arrays, sharing their memory where they are float32.

    Args:
        tensors: on a CPU, not float64.

    Returns:
        One flat array for each; None where one has no memory of its own, as under torch.vmap.
    """
    try:
        return tuple(tensor.detach().to(torch.float32).reshape(-1).numpy() for tensor in tensors)
    except RuntimeError:
        return None


def route_of(places: Places, out_features: int) -> Route:
    """The way of a row, made at the first call and kept as long as the places.

    Args:
        places: on a CPU.
        out_features: O.
    """
    key = id(places.indices)
    if key not in _ROUTES:
        order, source, row = places.indices[:3].numpy()
        target, starts = np.unique(row, return_index=True)
        _ROUTES[key] = Route(order, source, places.factors[0].numpy(), target, starts, out_features)
        weakref.finalize(places.indices, _ROUTES.pop, key)
    return _ROUTES[key]


def add_row(y: Floats, x: Floats, coefficients: Floats, route: Route, scale: float) -> None:
    """Add the residual of a row in place: y + x ΔWᵀ.

    Args:
        y: [O].
        x: [I].
        coefficients: [K].
        route: as `route_of` gives it.
        scale: of ΔW's sums: scaling / (O I).
    """
    weights = coefficients.take(route.order)[:, None] * route.factors
    taken = np.fft.rfft(x).astype(np.complex64, copy=False).take(route.source)
    parts = taken.view(np.float32).reshape(-1, 2)
    parts *= weights
    bins = np.zeros(route.length // 2 + 1, np.complex64)
    bins[route.target] = np.add.reduceat(taken, route.starts)
    residual = np.fft.irfft(bins, route.length, norm="forward")
    residual *= scale
    y += residual
