"""The residual of one row, for decoding token by token on a CPU.

For one row the calls cost more than the arithmetic, and so does a dispatched operator: a kernel does all of
it on the memory of the tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.fourier.rfft_positions import Places

_LARGEST = 47  # radix: the time of a length is in proportion to the sum of its radices

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[Any]


class Route(NamedTuple):
    """How one row of x reaches one row of y.

    Attributes:
        indices: [3, K] int64: order of the coefficients, bins of x, bins of y, as in `Places`.
        factors: [K, 2] float32 of the real and the imaginary parts.
        roots: of unity, as in `kernels.fourier.add_row`.
        radices: the same; None where a length has a large prime factor.
        kernel: that function.
    """

    indices: Numbers
    factors: Floats
    roots: Floats
    radices: Numbers | None
    kernel: Callable[..., None]


_ROUTES: dict[int, Route] = {}  # by the identity of the indices of places, while they live


def add_row(y: Tensor, x: Tensor, coefficients: Tensor, places: Places, scale: float) -> bool:
    """Add the residual x ΔWᵀ of one row, in place.

    Returns whether it was added: not where a tensor has no memory, as under torch.vmap.

    Args:
        y: [..., O] float32 of O elements, contiguous, on a CPU.
        x: [..., I] of I elements there, any float dtype but float64.
        coefficients: [K] float, there too.
        scale: of the sums over coefficients.
    """
    try:
        out, row, values = y.numpy().reshape(-1), _numbers(x).reshape(-1), _numbers(coefficients)
    except RuntimeError:
        return False
    route = _ROUTES.get(id(places.indices)) or _make_route(places, len(row), len(out))
    if route.radices is None:
        out += plain_residual(row, values, places, len(out), scale)
    else:
        route.kernel(row, values, route.indices, route.factors, scale, route.roots, route.radices, out)
    return True


def _numbers(x: Tensor) -> Floats:
    plain = x.detach() if x.requires_grad else x
    numbers: Floats = (plain if x.dtype == torch.float32 else plain.float()).numpy()
    return numbers


def _make_route(places: Places, columns: int, rows: int) -> Route:
    """Made at the first call and kept as long as the places, which are on a CPU."""
    from spectral_surgery.kernels.fourier import add_row as kernel

    roots = [part for length, sign in ((columns, -1), (rows, 1)) for part in roots_of(length, sign)]
    into, out = radices_of(columns), radices_of(rows)
    radices = None if into is None or out is None else np.array([len(into), *into, *out], np.int64)
    indices, factors = places.indices[:3].numpy(), places.factors[0].numpy()
    route = Route(indices, factors, np.concatenate(roots), radices, kernel)
    key = id(places.indices)
    _ROUTES[key] = route
    weakref.finalize(places.indices, _ROUTES.pop, key)
    return route


def roots_of(length: int, sign: int) -> tuple[Floats, Floats]:
    """Powers of the root of unity of this order: cosines, and sines times the sign of the transform."""
    angles = np.arange(length) * (2 * np.pi / length)
    return np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32)


def radices_of(length: int) -> list[int] | None:
    """Of a length, or of half of an even one; None where one would be too large."""
    radices, rest = [], length if length % 2 else length // 2
    for radix in (4, 2, *range(3, _LARGEST + 1, 2)):
        while not rest % radix:
            radices.append(radix)
            rest //= radix
    return radices if rest == 1 else None


def plain_residual(row: Floats, values: Floats, places: Places, out_features: int, scale: float) -> Floats:
    """The same by numpy, for lengths with large prime factors: [O] float32."""
    order, source, target = places.indices[:3].numpy()
    weights = values.take(order)[:, None] * places.factors[0].numpy()
    taken = np.fft.rfft(row).astype(np.complex64, copy=False).take(source)
    parts = taken.view(np.float32).reshape(-1, 2)
    parts *= weights * np.float32(scale)
    bins = np.zeros(out_features // 2 + 1, np.complex64)
    np.add.at(bins, target, taken)
    return np.fft.irfft(bins, out_features, norm="forward").astype(np.float32, copy=False)
