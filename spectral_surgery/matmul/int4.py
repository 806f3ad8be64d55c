"""Half a byte a weight, where all but a few codes fit: signed nibbles, unpacked a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, frame_spans
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.matmul import integer, triton
from spectral_surgery.matmul.code_blocks import reach, refusal
from spectral_surgery.matmul.levels import Grid, grid_of
from spectral_surgery.matmul.matrix_job import Kind, read_levels
from spectral_surgery.matmul.outliers import FEW, Outliers, add_block, add_levels, add_product
from spectral_surgery.matmul.row_ranges import RowRanges

_LOW, _HIGH = -8, 7
_MOST_BEYOND = 64  # at most one code in 64 may be an outlier
BLOCK = 1 << 22  # weights unpacked at a time: few calls of all threads, and 4 MiB


@dataclass(frozen=True)
class Int4Form:
    """Codes as nibbles; see `Form`.

    Attributes:
        codes: [O, ceil(I / 2)] int8: the low nibbles are the first half of the columns, the high ones the rest.
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        basis: transform, tile and axes.
        grid: [2] int8, `Grid` of the reconstruction points: parts and shift.
        places: [n] int32 or int64, row * I + column of the codes that nibbles do not hold, ascending.
        beyond: [n] int8, their levels less those of the nearest nibbles.
        columns: I.
    """

    codes: Tensor
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

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        operand = integer.prepare(x, accuracy)
        if operand.how == "triton" and (len(x) <= FEW or not len(self.places)):
            y = triton.packed_product(operand.x, self.codes, self.grid)
            return add_product(y, x, self.places, self.beyond, self.columns)
        return integer.product_of_blocks(operand, self.blocks())

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        return integer.adjoint_of_blocks(g, accuracy, self.blocks(), self.columns)

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8."""
        levels = self._grid.levels_(unpack(self.codes[rows], self.columns))
        return add_levels(levels, rows, self.places, self.beyond, self.columns)

    def recorded_levels(self) -> Tensor:
        """[O, I] int8, without a look at the grid."""
        codes = unpack(self.codes, self.columns)
        levels = (codes * self.grid[0] + codes.sign() * self.grid[1]).flatten()
        return levels.index_add(0, self.places, self.beyond).reshape(-1, self.columns)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and levels of blocks of rows."""
        for start, stop in frame_spans(len(self.codes), max(1, BLOCK // self.columns)):
            levels = read_levels(self, start, stop)
            if levels is None:
                levels = self._grid.levels_(unpack(self.codes[start:stop], self.columns))
            yield start, add_block(levels, start, self.places, self.beyond)

    @property
    def kind(self) -> Kind:
        """What kernels call such levels."""
        grid = self._grid
        return Kind("NIBBLES" if grid == Grid(1, 0) else "POINTS", grid.parts, grid.shift)

    @property
    def _grid(self) -> Grid:
        return Grid(*self.grid.tolist())


def outlier_bytes(weights: int, most_beyond: int = _MOST_BEYOND) -> int:
    """What codes beyond nibbles take at most: a place in 4 bytes and a level in one for each."""
    return 5 * (weights // most_beyond)


def int4_form(ranges: RowRanges, most_beyond: int = _MOST_BEYOND) -> Int4Form:
    """Nibbles of a matrix, decoded block by block.

    Args:
        ranges: of one offset.
        most_beyond: at most one code in this many may be outside of -8 to 7.

    Raises:
        ConfigError: when more of its codes do not fit 4 bits, or one of them or their offset no int8 grid.
    """
    rows, columns = ranges.shape
    packed = empty((rows, -(-columns // 2)), torch.int8).to(ranges.device)
    grid, low, high = grid_of(ranges.outlines[0].offset), 0, 0
    outliers = Outliers(ranges.shape, most_beyond)
    for spectrum, start, codes in ranges.blocks():
        least, most = reach(codes)
        low, high = min(low, least), max(high, most)
        part = codes.clamp(_LOW, _HIGH).to(torch.int8)
        few = (least >= _LOW and most <= _HIGH) or outliers.add(start, codes - part)
        if grid is None or not few or not grid.fits(low, high):
            but = f", but for one code in {most_beyond}"
            raise refusal(spectrum, "int4", (low, high), (_LOW, _HIGH), but)
        pack(part, packed[start : start + len(part)])
    found = cast(Grid, grid)
    places, rest = outliers.tensors(packed.device)
    stored = torch.tensor([found.parts, found.shift], dtype=torch.int8, device=packed.device)
    scales = ranges.scales([found.parts] * len(ranges.outlines))
    return Int4Form(packed, *scales, stored, places, (rest * found.parts).to(torch.int8), ranges.basis, columns)


def pack(codes: Tensor, out: Tensor) -> None:
    """Codes [r, I] int8 from -8 to 7 to nibbles [r, ceil(I / 2)] int8, as in an `Int4Form`."""
    half = out.shape[1]
    out.copy_(codes[:, :half] & 15)
    out[:, : codes.shape[1] - half] |= codes[:, half:] << 4


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: [r, ceil(I / 2)] int8 to [r, I] int8."""
    low = packed.bitwise_left_shift(4).bitwise_right_shift(4)  # keeps the sign
    return torch.cat([low, packed.bitwise_right_shift(4)], 1)[:, :columns].contiguous()
