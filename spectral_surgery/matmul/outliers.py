"""The few levels that half a byte, or a byte, does not hold: what they go beyond it by, as a sparse matrix S beside it.

One weight among hundreds is an outlier in matrices of real models; without this, hardly any would fit. Everything here
takes ``places``, [n] int32 or int64, row * I + column in ascending order, ``beyond``, [n] int8 or float32, and I.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 16  # tokens; more are faster with outliers and other levels in one matrix
_AT_ONCE = 1 << 20  # products under way


class Outliers:
    """The outliers of a matrix while its codes are read, a block of rows after the other."""

    def __init__(self, shape: tuple[int, int], most: int) -> None:
        """Begin with none.

        Args:
            shape: (O, I).
            most: at most one level in this many may be an outlier.
        """
        weights = shape[0] * shape[1]
        self._columns, self._room = shape[1], weights // most
        self._index = torch.int32 if weights <= torch.iinfo(torch.int32).max else torch.int64
        self._pieces = [(torch.empty(0, dtype=self._index), torch.empty(0, dtype=torch.int32))]

    def add(self, start: int, rest: Tensor) -> bool:
        """Keep what is not zero of what levels go beyond by, [r, I] integers; False where these are too many."""
        flat = rest.reshape(-1)
        places = torch.nonzero(flat).reshape(-1)
        self._room -= len(places)
        if self._room >= 0:
            index = (places + start * self._columns).to(self._index)
            self._pieces.append((index.cpu(), flat[places].to(torch.int32).cpu()))
        return self._room >= 0

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``places`` and ``beyond``, [n] int32, of all blocks."""
        places, beyond = (torch.cat(pieces).to(device) for pieces in zip(*self._pieces, strict=True))
        return places, beyond


def add_product(
    y: Tensor, x: Tensor, places: Tensor, beyond: Tensor, columns: int, *, transposed: bool = False
) -> Tensor:
    """Y + X Sᵀ, or Y + X S where it is ``transposed``: [T, O] and [T, I], or the other way round.

    Returns float32 or wider where S is not empty.
    """
    if not len(places):
        return y
    out = y.to(torch.promote_types(y.dtype, torch.float32), copy=True)
    if out.is_cpu and out.dtype == x.dtype == torch.float32 and len(x) <= FEW and not transposed:
        from spectral_surgery.kernels import outliers

        outliers.add_product(*(part.numpy() for part in (out, x.T.contiguous(), places, beyond)))
        return out
    step = max(1, _AT_ONCE // max(len(x), 1))
    for start in range(0, len(places), step):
        here = places[start : start + step].long()
        to, of = (here % columns, here // columns) if transposed else (here // columns, here % columns)
        values = torch.gather(x, 1, of.expand(len(x), -1)).to(out.dtype).mul_(beyond[start : start + step])
        out.scatter_add_(1, to.expand(len(x), -1), values)
    return out


def add_levels(levels: Tensor, rows: Tensor, places: Tensor, beyond: Tensor, columns: int) -> Tensor:
    """Add some rows of S to those of the other levels, [n, I] of the dtype of ``beyond``, in place."""
    if len(places):
        starts, ends = (torch.searchsorted(places, ((rows + end) * columns).to(places.dtype)) for end in (0, 1))
        counts = ends - starts
        to = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts - starts, counts)
        number = torch.arange(len(to), device=rows.device) - before
        levels[to, places[number] % columns] += beyond[number]
    return levels


def add_block(levels: Tensor, start: int, places: Tensor, beyond: Tensor) -> Tensor:
    """Add what S has in consecutive rows to their other levels, [r, I] and contiguous, in place."""
    if len(places):
        limits = places.new_tensor([start * levels.shape[1], (start + len(levels)) * levels.shape[1]])
        first, last = torch.searchsorted(places, limits).tolist()
        here = places[first:last].long() - start * levels.shape[1]
        levels.view(-1).index_add_(0, here, beyond[first:last].to(levels.dtype))
    return levels
