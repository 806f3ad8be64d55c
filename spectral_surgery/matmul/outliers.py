"""The few levels that half a byte does not hold: what they go beyond it by, as a sparse matrix S beside the packed one.

One weight among hundreds is an outlier in matrices of real models; without this, hardly any would fit. Everything here
takes ``places``, [n] int32 or int64, row * I + column in ascending order, ``beyond``, [n] int8, and I.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # products under way


def add_product(y: Tensor, x: Tensor, places: Tensor, beyond: Tensor, columns: int) -> Tensor:
    """Y + X Sᵀ: [T, O] and [T, I] to [T, O], float32 or wider where S is not empty."""
    if not len(places):
        return y
    out = y.to(torch.promote_types(y.dtype, torch.float32))
    for some in _parts(len(places), len(x)):
        _add(out, places[some] // columns, x, places[some] % columns, beyond[some])
    return out


def add_adjoint(out: Tensor, g: Tensor, places: Tensor, beyond: Tensor, columns: int) -> Tensor:
    """Add G S to ``out``, float32 or wider, in place: [T, O] to [T, I]."""
    for some in _parts(len(places), len(g)):
        _add(out, places[some] % columns, g, places[some] // columns, beyond[some])
    return out


def add_levels(levels: Tensor, rows: Tensor, places: Tensor, beyond: Tensor, columns: int) -> Tensor:
    """Add some rows of S to those of the packed levels, [n, I] int8, in place."""
    if len(places):
        starts, ends = (torch.searchsorted(places, ((rows + end) * columns).to(places.dtype)) for end in (0, 1))
        counts = ends - starts
        to = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts - starts, counts)
        number = torch.arange(len(to), device=rows.device) - before
        levels[to, places[number] % columns] += beyond[number]
    return levels


def add_block(levels: Tensor, start: int, places: Tensor, beyond: Tensor) -> Tensor:
    """Add what S has in consecutive rows to their packed levels, [r, I] int8 and contiguous, in place."""
    if len(places):
        limits = places.new_tensor([start * levels.shape[1], (start + len(levels)) * levels.shape[1]])
        first, last = torch.searchsorted(places, limits).tolist()
        here = places[first:last].long() - start * levels.shape[1]
        levels.view(-1)[here] += beyond[first:last]
    return levels


def _add(out: Tensor, to: Tensor, x: Tensor, of: Tensor, factor: Tensor) -> None:
    every = (len(x), -1)
    values = torch.gather(x, 1, of.long().expand(every)).to(out.dtype).mul_(factor)
    out.scatter_add_(1, to.long().expand(every), values)


def _parts(count: int, tokens: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // max(tokens, 1))
    return (slice(start, start + step) for start in range(0, count, step))
