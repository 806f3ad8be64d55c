"""Levels in memory, whatever the layout, and beside them the few that it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, frame_spans
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.matmul import integer
from spectral_surgery.matmul.code_blocks import Spectrum, reach, refusal
from spectral_surgery.matmul.host_offload import HostMatrix
from spectral_surgery.matmul.levels import Grid, grid_of
from spectral_surgery.matmul.matrix_job import Kind, read_levels
from spectral_surgery.matmul.outliers import FEW, Outliers, add_block, add_levels, add_product
from spectral_surgery.matmul.planes import BYTES, LAYOUTS, NIBBLES, Layout
from spectral_surgery.matmul.row_ranges import RowRanges

BLOCK = 1 << 22  # weights unpacked at a time: few calls of all threads, and 4 MiB
_SPAN = 16  # columns: a multiple of them has bits that kernels read, of half a row in whole bytes
_ALONE = {BYTES: "int8", NIBBLES: "int4"}  # layouts of one plane
_UNSHIFTED = Grid(1, 0)


@dataclass(frozen=True)
class LevelForm:
    """Numbers in planes; see `Form`.

    Attributes:
        codes: [O, bytes of a row] int8, the first plane.
        lowest: [O, bytes of a row] int8 or uint8, the second plane; [O, 0] where there is none.
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        grid: [2] int8, `Grid` of the reconstruction points: parts and shift; [0] where numbers are levels.
        places: [n] int32 or int64, row * I + column of the levels that the layout does not hold, ascending.
        beyond: [n] float32, or int8 with a grid: these levels less those that are held there.
        basis: transform, tile and axes.
        shape: (O, I).
        layout: name in LAYOUTS.
        host: all planes in host memory, those of a row one after the other; ``codes`` is [0, 0] then, and ``lowest``
            [O, 0].
    """

    codes: Tensor
    lowest: Tensor
    scale: Tensor
    row_scale: Tensor
    grid: Tensor
    places: Tensor
    beyond: Tensor
    basis: Basis
    shape: tuple[int, int]
    layout: str
    host: HostMatrix | None = None

    @property
    def kind(self) -> Kind | None:
        """What kernels call such levels; None for those that they cannot read at once."""
        grid = self.points
        if self.host is not None:
            return None
        if self.layout == "int5":
            return None if self.shape[1] % _SPAN or grid != _UNSHIFTED else Kind("FIVE", 1, 0)
        if self.layout == "int4":
            return Kind("NIBBLES" if grid == _UNSHIFTED else "POINTS", grid.parts, grid.shift)
        return Kind("BYTES", 1, 0) if self.layout == "int8" else None

    def product(self, x: Tensor, accuracy: torch.dtype, *, transposed: bool = False) -> Tensor:
        """[T, I] to [T, O]; transposed: [T, O] to [T, I]."""
        if self.host is not None:
            return self._streamed(self.host, x, accuracy, transposed=transposed)
        few, sparse = len(x) <= FEW and x.dtype != torch.float64, (self.places, self.beyond, self.shape[1])
        if LAYOUTS[self.layout].wide:
            high, low = self.digits()
            y = low.product(x, accuracy, transposed=transposed)
            y = torch.add(y, high.product(x, accuracy, transposed=transposed), alpha=1 << NIBBLES.bits)
            return add_product(y, x, *sparse, transposed=transposed)
        apart = self.beyond.is_floating_point()  # outliers, which no int8 holds
        inside = apart and len(self.places) > 0 and not few
        operand = integer.prepare(x, accuracy, blocks=inside)
        y = integer.product_of_blocks(operand, self._blocks(), self._added if inside else None, transposed=transposed)
        return add_product(y, x, *sparse, transposed=transposed) if apart and not inside else y

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8, or float32 where some are beyond it; of host memory only these cross the bus."""
        levels = self.points.levels_(self._numbers(rows))
        if len(self.places) or LAYOUTS[self.layout].wide:
            levels = levels.to(self.beyond.dtype)
        return add_levels(levels, rows, self.places, self.beyond, self.shape[1])

    def recorded_levels(self) -> Tensor:
        """[O, I] int8, or float32 where some are beyond it; without a look at the grid, and all at once."""
        levels = self._numbers(slice(None))
        if self.grid.nbytes:
            levels = levels * self.grid[0] + levels.sign() * self.grid[1]
        if not self.places.nbytes:
            return levels.float() if LAYOUTS[self.layout].wide else levels
        return levels.to(self.beyond.dtype).flatten().index_add(0, self.places, self.beyond).reshape(self.shape)

    def digits(self) -> list[LevelForm]:
        """A form of each plane of two, without outliers: the first counts 16 times."""
        plain = replace(self, lowest=self.lowest[:, :0], places=self.places[:0], beyond=self.beyond[:0])
        planes = zip(LAYOUTS[self.layout].planes, (self.codes, self.lowest), strict=True)
        return [replace(plain, codes=codes, layout=_ALONE[plane]) for plane, codes in planes]

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and levels of blocks of rows, int8, with outliers if these are."""
        if self.layout == "int8":
            yield 0, self.codes
            return
        for start, stop in frame_spans(self.shape[0], max(1, BLOCK // self.shape[1])):
            levels = read_levels(self, start, stop)
            if levels is None:
                levels = self.points.levels_(self._numbers(slice(start, stop)))
            yield start, levels if self.beyond.is_floating_point() else self._added(start, levels)

    def _numbers(self, rows: Tensor | slice) -> Tensor:
        layout = LAYOUTS[self.layout]
        if self.host is None:
            planes = [self.codes[rows], self.lowest[rows]][: len(layout.planes)]
        else:
            some = self.host.codes[rows.cpu() if isinstance(rows, Tensor) else rows]
            planes = layout.planes_of(some.to(self.scale.device), self.shape[1])
        return layout.join(planes, self.shape[1])

    def _streamed(self, host: HostMatrix, x: Tensor, accuracy: torch.dtype, *, transposed: bool) -> Tensor:
        """`product`, block by block; outliers are added at the end."""
        parts: list[Tensor] = []
        plain = replace(self, host=None, places=self.places[:0], beyond=self.beyond[:0])
        with host.blocks(x.device) as blocks:
            for start, block in blocks:
                rows = slice(start, start + len(block))
                codes, *lowest = LAYOUTS[self.layout].planes_of(block, self.shape[1])
                second = lowest[0] if lowest else self.lowest[rows]
                form = replace(plain, codes=codes, lowest=second, shape=(len(block), self.shape[1]))
                part = form.product(x[:, rows] if transposed else x, accuracy, transposed=transposed)
                parts = [parts[0].add_(part)] if transposed and parts else [*parts, part]
        return add_product(torch.cat(parts, 1), x, self.places, self.beyond, self.shape[1], transposed=transposed)

    def _added(self, start: int, levels: Tensor) -> Tensor:
        return add_block(levels, start, self.places, self.beyond)

    @property
    def points(self) -> Grid:
        """The grid that numbers are on."""
        return Grid(*self.grid.tolist()) if self.grid.numel() else _UNSHIFTED


def level_form(ranges: RowRanges, layout: Layout) -> LevelForm:
    """Levels of a matrix, decoded block by block.

    Args:
        ranges: of one offset, where the layout holds codes.

    Raises:
        ConfigError: when too many of its numbers are beyond the layout, or their offset is on no grid of int8.
    """
    planes = [empty((ranges.shape[0], plane.width(ranges.shape[1])), plane.dtype) for plane in layout.planes]
    outliers = Outliers(ranges.shape, layout.most_beyond)
    for spectrum, start, codes in ranges.blocks(planes[0] if layout.name == "int8" else None):
        here, grid = slice(start, start + len(codes)), _grid_of(spectrum, layout)
        if layout.name == "int8" and _in_place(codes, grid, planes[0][here]):
            continue
        numbers = codes.cpu() if layout.points else grid.levels_(codes.to("cpu", torch.int32, copy=True))
        low, high = reach(numbers)
        held = numbers.clamp(*layout.limits)
        few = (layout.limits[0] <= low and high <= layout.limits[1]) or outliers.add(start, numbers - held)
        if not few or (layout.points and not grid.fits(low, high)):
            but = f", but for one code in {layout.most_beyond}"
            raise refusal(spectrum, layout.name, reach(codes), layout.limits, but)
        for plane, packed in zip(planes, layout.split(held), strict=True):
            plane[here] = packed
    return _form(ranges, layout, [plane.to(ranges.device) for plane in planes], outliers)


def _in_place(codes: Tensor, grid: Grid, out: Tensor) -> bool:
    """Write levels to int8 rows, where all of them fit; codes may be there already."""
    if not (grid == _UNSHIFTED and codes.dtype == torch.int8) and not grid.fits(*reach(codes)):
        return False
    if codes.data_ptr() != out.data_ptr():
        out.copy_(codes)
    grid.levels_(out)
    return True


def _form(ranges: RowRanges, layout: Layout, planes: list[Tensor], outliers: Outliers) -> LevelForm:
    device, grids = ranges.device, [_grid_of(outline, layout) for outline in ranges.outlines]
    places, rest = outliers.tensors(device)
    scale, row_scale = ranges.scales([grid.parts for grid in grids])
    points = [grids[0].parts, grids[0].shift] if layout.points else []
    lowest = planes[1] if len(planes) > 1 else torch.empty((ranges.shape[0], 0), dtype=torch.int8, device=device)
    return LevelForm(
        codes=planes[0],
        lowest=lowest,
        scale=scale,
        row_scale=row_scale,
        grid=torch.tensor(points, dtype=torch.int8, device=device),
        places=places,
        beyond=(rest * grids[0].parts).to(torch.int8) if layout.points else rest.to(torch.float32),
        basis=ranges.basis,
        shape=ranges.shape,
        layout=layout.name,
    )


def _grid_of(spectrum: Spectrum, layout: Layout) -> Grid:
    """The grid of its levels. Raises ConfigError when its offset is on none."""
    grid = grid_of(spectrum.offset)
    if grid is None:
        raise refusal(spectrum, layout.name, (0, 0), layout.limits)
    return grid


def transposed_form(form: LevelForm) -> LevelForm | None:
    """The form of Vᵀ from that of V, so that its rows serve kernels that have rows only.

    Returns None for others than int8 on a device, and where columns of V have scales, which rows would get then.
    """
    if form.layout != "int8" or form.host is not None or form.scale.numel() > 1:
        return None
    rows, columns = form.shape
    places = form.places.long() % columns * rows + form.places // columns
    order = torch.argsort(places)
    return replace(
        form,
        codes=form.codes.T.contiguous(),
        lowest=form.lowest.new_empty((columns, 0)),
        scale=form.scale * form.row_scale if len(form.row_scale) else form.scale,
        row_scale=form.row_scale[:0],
        places=places[order].to(form.places.dtype),
        beyond=form.beyond[order],
        basis=replace(form.basis, axes=tuple(sorted(1 - axis for axis in form.basis.axes))),
        shape=(columns, rows),
    )
