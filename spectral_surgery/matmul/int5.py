"""Five bits a weight: nibbles, and a plane of lowest bits beside them. A file of three bits a weight fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, frame_spans
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.matmul import integer
from spectral_surgery.matmul.code_blocks import reach, refusal
from spectral_surgery.matmul.int4 import BLOCK, pack, unpack
from spectral_surgery.matmul.levels import Grid, grid_of
from spectral_surgery.matmul.matrix_job import Kind, read_levels
from spectral_surgery.matmul.outliers import Outliers, add_block, add_levels
from spectral_surgery.matmul.row_ranges import RowRanges

_LOW, _HIGH = -16, 15
_MOST_BEYOND = 64  # at most one code in 64 may be an outlier
_COLUMNS = 16  # a multiple of them is what kernels read: bits of half a row are whole bytes


@dataclass(frozen=True)
class Int5Form:
    """Codes as 2 nibble + lowest bit; see `Form`.

    Attributes:
        codes: [O, ceil(I / 2)] int8, nibbles as in an `Int4Form`.
        lowest: [O, ceil(I / 8)] uint8, the lowest bits in order of columns, the first one the lowest of a byte.
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        grid: [2] int8, `Grid` of the reconstruction points: parts and shift.
        places: [n] int32 or int64, row * I + column of the codes that five bits do not hold, ascending.
        beyond: [n] int8, their levels less those of the nearest of five bits.
        basis: transform, tile and axes.
        columns: I.
    """

    codes: Tensor
    lowest: Tensor
    scale: Tensor
    row_scale: Tensor
    grid: Tensor
    places: Tensor
    beyond: Tensor
    basis: Basis
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (self.codes.shape[0], self.columns)

    @property
    def kind(self) -> Kind | None:
        """What kernels call such levels; None for those that they cannot read."""
        return None if self.columns % _COLUMNS or self._grid != Grid(1, 0) else Kind("FIVE", 1, 0)

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        return integer.product_of_blocks(integer.prepare(x, accuracy), self.blocks())

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        return integer.adjoint_of_blocks(g, accuracy, self.blocks(), self.columns)

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8."""
        levels = self._grid.levels_(_unpack(self.codes[rows], self.lowest[rows], self.columns))
        return add_levels(levels, rows, self.places, self.beyond, self.columns)

    def recorded_levels(self) -> Tensor:
        """[O, I] int8, without a look at the grid."""
        codes = _unpack(self.codes, self.lowest, self.columns)
        levels = (codes * self.grid[0] + codes.sign() * self.grid[1]).flatten()
        return levels.index_add(0, self.places, self.beyond).reshape(self.shape)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and levels of blocks of rows."""
        for start, stop in frame_spans(len(self.codes), max(1, BLOCK // self.columns)):
            levels = read_levels(self, start, stop)
            if levels is None:
                levels = _unpack(self.codes[start:stop], self.lowest[start:stop], self.columns)
                self._grid.levels_(levels)
            yield start, add_block(levels, start, self.places, self.beyond)

    @property
    def _grid(self) -> Grid:
        return Grid(*self.grid.tolist())


def int5_form(ranges: RowRanges) -> Int5Form:
    """Codes of a matrix of one offset, decoded block by block.

    Raises ConfigError when more of its codes do not fit five bits, or one of them or their offset no int8 grid.
    """
    rows, columns = ranges.shape
    codes, lowest = empty((rows, -(-columns // 2)), torch.int8), empty((rows, -(-columns // 8)), torch.uint8)
    grid, low, high = grid_of(ranges.outlines[0].offset), 0, 0
    outliers = Outliers(ranges.shape, _MOST_BEYOND)
    for spectrum, start, block in ranges.blocks():
        least, most = reach(block)
        low, high = min(low, least), max(high, most)
        part = block.clamp(_LOW, _HIGH).to("cpu", torch.int8)
        few = (least >= _LOW and most <= _HIGH) or outliers.add(start, block.cpu() - part)
        if grid is None or not few or not grid.fits(low, high):
            raise refusal(spectrum, "int5", (low, high), (_LOW, _HIGH), f", but for one code in {_MOST_BEYOND}")
        here = slice(start, start + len(part))
        pack(part >> 1, codes[here])
        lowest[here] = torch.from_numpy(np.packbits((part & 1).numpy(), axis=1, bitorder="little"))
    found = cast(Grid, grid)
    places, rest = outliers.tensors(ranges.device)
    stored = torch.tensor([found.parts, found.shift], dtype=torch.int8, device=ranges.device)
    scales, beyond = ranges.scales([found.parts] * len(ranges.outlines)), (rest * found.parts).to(torch.int8)
    planes = codes.to(ranges.device), lowest.to(ranges.device)
    return Int5Form(*planes, *scales, stored, places, beyond, ranges.basis, columns)


def int5_bytes(weights: int, stored: int) -> int:
    """Bytes of a form at most; a place in 4 bytes and a level in one for every code beyond five bits."""
    del stored
    return -(-weights // 2) + -(-weights // 8) + 5 * (weights // _MOST_BEYOND)


def _unpack(codes: Tensor, lowest: Tensor, columns: int) -> Tensor:
    """Nibbles and lowest bits of rows to [r, I] int8."""
    bits = (lowest.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=lowest.device)) & 1
    return (unpack(codes, columns) << 1) | bits.flatten(1)[:, :columns].to(torch.int8)
