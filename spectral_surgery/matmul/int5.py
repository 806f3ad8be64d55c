"""Five bits a weight: nibbles, and a plane of lowest bits beside them. A file of three bits a weight fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, frame_spans
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul import integer
from spectral_surgery.matmul.code_blocks import reach, refusal
from spectral_surgery.matmul.int4 import BLOCK, pack, unpack
from spectral_surgery.matmul.levels import Grid, grid_of
from spectral_surgery.matmul.matrix_job import Kind, read_levels
from spectral_surgery.matmul.outliers import Outliers, add_block, add_levels
from spectral_surgery.matmul.row_ranges import RowRanges

_LOW, _HIGH = -16, 15
_MOST_BEYOND = 64  # at most one code in 64 may be an outlier
_COLUMNS = 16  # bits of half a row are whole bytes


@dataclass(frozen=True)
class Int5Form:
    """Levels as 2 nibble + lowest bit; see `Form`.

    Attributes:
        codes: [O, I / 2] int8, nibbles as in an `Int4Form`.
        lowest: [O, I / 8] uint8, the lowest bits in order of columns, the first one the lowest of a byte.
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        places: [n] int32 or int64, row * I + column of the levels that five bits do not hold, ascending.
        beyond: [n] int8, these levels less the nearest of five bits.
        basis: transform, tile and axes.
    """

    codes: Tensor
    lowest: Tensor
    scale: Tensor
    row_scale: Tensor
    places: Tensor
    beyond: Tensor
    basis: Basis

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (self.codes.shape[0], 2 * self.codes.shape[1])

    @property
    def kind(self) -> Kind:
        """What kernels call such levels."""
        return Kind("FIVE", 1, 0)

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        return integer.product_of_blocks(x, accuracy, self.blocks())

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        return integer.adjoint_of_blocks(g, accuracy, self.blocks(), self.shape[1])

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8."""
        levels = _unpack(self.codes[rows], self.lowest[rows])
        return add_levels(levels, rows, self.places, self.beyond, self.shape[1])

    def recorded_levels(self) -> Tensor:
        """[O, I] int8."""
        levels = _unpack(self.codes, self.lowest).flatten()
        return levels.index_add(0, self.places, self.beyond).reshape(self.shape)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and levels of blocks of rows."""
        for start, stop in frame_spans(len(self.codes), max(1, BLOCK // self.shape[1])):
            levels = read_levels(self, start, stop)
            if levels is None:
                levels = _unpack(self.codes[start:stop], self.lowest[start:stop])
            yield start, add_block(levels, start, self.places, self.beyond)


def int5_form(ranges: RowRanges) -> Int5Form:
    """Levels of a matrix, decoded block by block.

    Raises ConfigError when more of its codes do not fit five bits, its offset is not zero, or its width is no multiple
    of 16.
    """
    rows, columns = ranges.shape
    if columns % _COLUMNS:
        raise ConfigError(f"resident 'int5': {columns} columns; expected a multiple of {_COLUMNS}. Use int8.")
    codes, lowest = empty((rows, columns // 2), torch.int8), empty((rows, columns // 8), torch.uint8)
    outliers = Outliers(ranges.shape, _MOST_BEYOND)
    for spectrum, start, block in ranges.blocks():
        least, most = reach(block)
        part = block.clamp(_LOW, _HIGH).to(torch.int8)
        few = (least >= _LOW and most <= _HIGH) or outliers.add(start, block - part)
        if grid_of(spectrum.offset) != Grid(1, 0) or not few or not Grid(1, 0).fits(least, most):
            but = f", but for one code in {_MOST_BEYOND}, and no offset"
            raise refusal(spectrum, "int5", (least, most), (_LOW, _HIGH), but)
        here = slice(start, start + len(part))
        pack(part >> 1, codes[here])
        bits = np.packbits((part & 1).cpu().numpy(), axis=1, bitorder="little")
        lowest[here] = torch.from_numpy(bits)
    places, rest = outliers.tensors(ranges.device)
    scales = ranges.scales([1] * len(ranges.outlines))
    planes = codes.to(ranges.device), lowest.to(ranges.device)
    return Int5Form(*planes, *scales, places, rest.to(torch.int8), ranges.basis)


def int5_bytes(weights: int, stored: int) -> int:
    """Bytes of a form at most; a place in 4 bytes and a level in one for every code beyond five bits."""
    del stored
    return weights // 2 + weights // 8 + 5 * (weights // _MOST_BEYOND)


def _unpack(codes: Tensor, lowest: Tensor) -> Tensor:
    """[r, I / 2] and [r, I / 8] to [r, I] int8."""
    nibbles = unpack(codes, 2 * codes.shape[1])
    bits = (lowest.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=lowest.device)) & 1
    return (nibbles << 1) | bits.reshape(nibbles.shape).to(torch.int8)
