"""The residual of one row without FFTs, for decoding token by token on a CPU.

An FFT library prepares every call; for one row that takes longer than the transform, and so does a dispatched operator
of our own. Here a length n = a b is split once, after Cooley and Tukey, into transforms of a and b points with phases
between them: two small matrix products, all constants cached. Frequencies k = k1 + a k2 of real signals are kept for
k1 <= a / 2 only, as bin k2 (a // 2 + 1) + k1.
"""

from __future__ import annotations

import math
import weakref
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_surgery.ops.fourier_delta.places import Places, halves, unfolded_rows

_LARGEST = 256  # with a larger divisor a, the tables of a length would be large


class Tables(NamedTuple):
    """Constants of one length, H = a // 2 + 1.

    Attributes:
        shape: (a, b).
        first: [a, 2 H] cosines and minus sines of a points.
        phases: [b, H] complex.
        second: [b, b] complex.
    """

    shape: tuple[int, int]
    first: Tensor
    phases: Tensor
    second: Tensor


class Route(NamedTuple):
    """How one row of x reaches one row of y.

    Attributes:
        into: tables of I.
        source: [K] int64, bins of x.
        signs: [K, 2], for real and imaginary parts.
        target: [K] int64, bins of y.
        empty: [b H] complex zeros.
        out_of: tables of O, phases and second conjugated.
    """

    into: Tables
    source: Tensor
    signs: Tensor
    target: Tensor
    empty: Tensor
    out_of: Tables


_ROUTES: dict[int, Route | None] = {}  # by the identity of the indices of places, while they live


def route_of(places: Places, shape: tuple[int, int]) -> Route | None:
    """The way of a row, made at the first call and kept as long as the places.

    Args:
        places: on a CPU.
        shape: (O, I).

    Returns:
        None when a length has no two divisors of moderate size.
    """
    key = id(places.indices)
    if key not in _ROUTES:
        _ROUTES[key] = _route(places, shape)
        weakref.finalize(places.indices, _ROUTES.pop, key)
    return _ROUTES[key]


def add_row(y: Tensor, x: Tensor, coefficients: Tensor, route: Route, scale: float) -> Tensor:
    """Add the residual of a row: y + x ΔWᵀ.

    Args:
        y: [..., O], one row.
        x: [..., I], one row, not float64.
        coefficients: [K].
        route: as `route_of` gives it.
        scale: of ΔW's sums: scaling / (O I).

    Returns:
        [..., O] in the dtype of y.
    """
    into, source, signs, target, empty, (_, last, back, sums) = route
    parts = torch.mm(x.to(torch.float32).reshape(into.shape).t(), into.first).view(torch.complex64)  # [b, H]
    taken = torch.mm(into.second, parts * into.phases).view(-1).index_select(0, source)
    values = torch.view_as_real(taken) * (coefficients.to(torch.float32).unsqueeze(1) * signs)
    bins = empty.index_add(0, target, torch.view_as_complex(values)).view(back.shape)
    rows = (torch.mm(sums, bins) * back).view(torch.float32).t()  # [2 H, b]
    if y.dtype == torch.float32:
        return torch.addmm(y.view(len(last), -1), last, rows, alpha=scale).view(y.shape)
    return (y + torch.mm(last, rows).view(y.shape) * scale).to(y.dtype)


@lru_cache(maxsize=256)
def factor(length: int) -> int:
    """The divisor of a length next to its square root, from above."""
    root = next(b for b in range(math.isqrt(length), 0, -1) if length % b == 0)
    return length // root


@lru_cache(maxsize=64)
def _tables(length: int) -> Tables:
    a = factor(length)
    b, half = length // a, a // 2 + 1
    first = torch.view_as_real(_roots(a, half, a)).reshape(a, 2 * half)
    return Tables((a, b), first, _roots(b, half, length), _roots(b, b, b))


def _route(places: Places, shape: tuple[int, int]) -> Route | None:
    rows, columns = shape
    if max(factor(rows), factor(columns)) > _LARGEST:
        return None
    order = places.indices[0].argsort()
    row, column = unfolded_rows(places, rows)[order], places.indices[1][order]
    row, column, sign = halves(row, column, (rows, factor(rows)), (columns, factor(columns)))
    tables = _tables(rows)
    back = tables._replace(phases=tables.phases.conj().resolve_conj(), second=tables.second.conj().resolve_conj())
    signs = torch.stack((torch.ones_like(sign), sign), -1)
    empty = torch.zeros(back.phases.numel(), dtype=torch.complex64)
    return Route(_tables(columns), _bin(column, columns), signs, _bin(row, rows), empty, back)


def _bin(frequencies: Tensor, length: int) -> Tensor:
    a = factor(length)
    return frequencies // a * (a // 2 + 1) + frequencies % a


def _roots(rows: int, columns: int, length: int) -> Tensor:
    # [rows, columns] e^{-2πi r k / length}; r k is reduced first, to stay exact
    turns = torch.outer(torch.arange(rows), torch.arange(columns)) % length
    angles = turns.double() * (2 * math.pi / length)
    return torch.complex(angles.cos(), -angles.sin()).to(torch.complex64)
