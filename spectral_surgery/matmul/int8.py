"""One byte a weight: the levels themselves, and beside them the few that are larger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.codec.quantized import INT8_MAX
from spectral_surgery.matmul import integer
from spectral_surgery.matmul.code_blocks import Spectrum, reach, refusal
from spectral_surgery.matmul.levels import Grid, grid_of
from spectral_surgery.matmul.matrix_job import Kind
from spectral_surgery.matmul.outliers import FEW, Outliers, add_adjoint, add_block, add_levels, add_product
from spectral_surgery.matmul.row_ranges import RowRanges

_MOST_BEYOND = 64  # at most one level in 64 may be an outlier
_CLOSE = 6  # bits a weight: with fewer, hardly any level is beyond int8
_LIMITS = (-INT8_MAX, INT8_MAX)


@dataclass(frozen=True)
class Int8Form:
    """Levels as an int8 matrix; see `Form`.

    Attributes:
        codes: [O, I] int8 levels.
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        places: [n] int32 or int64, row * I + column of the levels that int8 does not hold, ascending.
        beyond: [n] float32, these levels less what ``codes`` has there.
        basis: transform, tile and axes.
    """

    codes: Tensor
    scale: Tensor
    row_scale: Tensor
    places: Tensor
    beyond: Tensor
    basis: Basis

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def kind(self) -> Kind:
        """What kernels call such levels."""
        return Kind("BYTES", 1, 0)

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        if self._inside(x):
            return integer.product(integer.prepare(x, accuracy, blocks=True), self.codes, self._added)
        y = integer.product(integer.prepare(x, accuracy), self.codes)
        return add_product(y, x, self.places, self.beyond, self.shape[1])

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        if self._inside(g):
            return integer.adjoint(integer.prepare(g, accuracy, blocks=True), self.codes, self._added)
        out = integer.adjoint(integer.prepare(g, accuracy), self.codes)
        return add_adjoint(out, g, self.places, self.beyond, self.shape[1])

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8, or float32 where there are outliers."""
        if not len(self.places):
            return self.codes[rows]
        return add_levels(self.codes[rows].float(), rows, self.places, self.beyond, self.shape[1])

    def recorded_levels(self) -> Tensor:
        """[O, I] int8, or float32 where there are outliers."""
        if not self.places.nbytes:
            return self.codes
        levels = self.codes.float().flatten()
        return levels.index_add(0, self.places, self.beyond).reshape(self.codes.shape)

    def _inside(self, x: Tensor) -> bool:
        """Whether outliers are put into blocks of floating levels, and are no product apart."""
        return len(self.places) > 0 and (len(x) > FEW or x.dtype == torch.float64)

    def _added(self, start: int, block: Tensor) -> Tensor:
        return add_block(block, start, self.places, self.beyond)


def int8_form(ranges: RowRanges) -> Int8Form:
    """Levels of a matrix, decoded block by block.

    Raises ConfigError when the offset of its codes does not fit int8, or too many of its levels do not.
    """
    levels = empty(ranges.shape, torch.int8).to(ranges.device)
    outliers = Outliers(ranges.shape, _MOST_BEYOND)
    for spectrum, start, codes in ranges.blocks(levels):
        block, grid = levels[start : start + len(codes)], level_grid(spectrum)
        low, high = (0, 0) if _are_levels(codes, grid) else reach(codes)
        if grid.fits(low, high):
            if codes.data_ptr() != block.data_ptr():
                block.copy_(codes)
            grid.levels_(block)
            continue
        wide = grid.levels_(codes.to(torch.int32, copy=True))
        block.copy_(wide.clamp(*_LIMITS))
        if not outliers.add(start, wide.sub_(block)):
            raise refusal(spectrum, "int8", (low, high), _LIMITS, f", but for one code in {_MOST_BEYOND}")
    places, beyond = outliers.tensors(levels.device)
    scales = ranges.scales([level_grid(outline).parts for outline in ranges.outlines])
    return Int8Form(levels, *scales, places, beyond.to(torch.float32), ranges.basis)


def int8_bytes(weights: int, stored: int) -> int:
    """Bytes of a form at most: beside the levels, a place and a number in 4 bytes each for every one beyond int8."""
    return weights + (8 * (weights // _MOST_BEYOND) if 8 * stored > _CLOSE * weights else 0)


def _are_levels(codes: Tensor, grid: Grid) -> bool:
    return grid == Grid(1, 0) and codes.dtype == torch.int8


def level_grid(spectrum: Spectrum) -> Grid:
    """The grid of its levels. Raises ConfigError when its offset is on none."""
    grid = grid_of(spectrum.offset)
    if grid is None:
        raise refusal(spectrum, "int8", (0, 0), _LIMITS)
    return grid


def transposed_form(form: Int8Form) -> Int8Form | None:
    """The form of Vᵀ from that of V, so that its rows serve kernels that have rows only.

    Returns None where columns of V have scales, which rows would get then.
    """
    if form.scale.numel() > 1:
        return None
    rows, columns = form.shape
    places = form.places.long() % columns * rows + form.places // columns
    order = torch.argsort(places)
    scale = form.scale * form.row_scale if len(form.row_scale) else form.scale
    axes = tuple(sorted(1 - axis for axis in form.basis.axes))
    basis = Basis(form.basis.transform, form.basis.tile, axes)
    sparse = places[order].to(form.places.dtype), form.beyond[order]
    return Int8Form(form.codes.T.contiguous(), scale, form.row_scale[:0], *sparse, basis)
