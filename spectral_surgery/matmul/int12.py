"""One and a half bytes a weight, for high rates: 16 times an int8 matrix, plus nibbles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.codec.quantized import INT12_MAX
from spectral_surgery.matmul.code_blocks import reach, refusal
from spectral_surgery.matmul.int4 import Int4Form, pack
from spectral_surgery.matmul.int8 import Int8Form, level_grid
from spectral_surgery.matmul.outliers import Outliers, add_adjoint, add_levels, add_product
from spectral_surgery.matmul.row_ranges import RowRanges

UNIT = 16
_MOST_BEYOND = 1 << 12  # at most one level in this many may be an outlier


@dataclass(frozen=True)
class Int12Form:
    """Levels as 16 codes + nibble; see `Form`.

    Attributes:
        codes: [O, I] int8.
        nibbles: [O, ceil(I / 2)] int8, -8 to 7, as in an `Int4Form`.
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        grid: [2] int8, of the nibbles: they are levels.
        places: [n] int32 or int64, row * I + column of the levels that 12 bits do not hold, ascending.
        beyond: [n] float32, these levels less what is held there.
        basis: transform, tile and axes.
    """

    codes: Tensor
    nibbles: Tensor
    scale: Tensor
    row_scale: Tensor
    grid: Tensor
    places: Tensor
    beyond: Tensor
    basis: Basis

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        high, low = self.planes()
        y = torch.add(low.product(x, accuracy), high.product(x, accuracy), alpha=UNIT)
        return add_product(y, x, self.places, self.beyond, self.shape[1])

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        high, low = self.planes()
        out = low.adjoint(g, accuracy).add_(high.adjoint(g, accuracy), alpha=UNIT)
        return add_adjoint(out, g, self.places, self.beyond, self.shape[1])

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] float32."""
        high, low = self.planes()
        levels = low.levels(rows).float().add_(high.levels(rows), alpha=UNIT)
        return add_levels(levels, rows, self.places, self.beyond, self.shape[1])

    def recorded_levels(self) -> Tensor:
        """[O, I] float32."""
        high, low = self.planes()
        levels = (high.recorded_levels().float() * UNIT + low.recorded_levels()).flatten()
        return levels.index_add(0, self.places, self.beyond).reshape(self.codes.shape)

    def planes(self) -> tuple[Int8Form, Int4Form]:
        """What counts `UNIT` times, and what counts once; without outliers."""
        scales, nothing = (self.scale, self.row_scale), self.places[:0]
        high = Int8Form(self.codes, *scales, nothing, self.beyond[:0], self.basis)
        return high, Int4Form(self.nibbles, *scales, self.grid, nothing, self.codes[:0, 0], self.basis, self.shape[1])


def int12_form(ranges: RowRanges) -> Int12Form:
    """Levels of a matrix, decoded block by block.

    Raises ConfigError when the offset of its codes does not fit int8, or too many of its levels do not fit 12 bits.
    """
    rows, columns = ranges.shape
    codes, nibbles = empty((rows, columns), torch.int8), empty((rows, -(-columns // 2)), torch.int8)
    outliers = Outliers(ranges.shape, _MOST_BEYOND)
    for spectrum, start, block in ranges.blocks():
        wide = level_grid(spectrum).levels_(block.to("cpu", torch.int32, copy=True))
        held = wide.clamp(-INT12_MAX, INT12_MAX)
        if not outliers.add(start, wide - held):
            but = f", but for one code in {_MOST_BEYOND}"
            raise refusal(spectrum, "int12", reach(block), (-INT12_MAX, INT12_MAX), but)
        high = (held + 8).bitwise_right_shift_(4)
        codes[start : start + len(block)] = high
        pack(held.sub_(high, alpha=UNIT).to(torch.int8), nibbles[start : start + len(block)])
    places, beyond = outliers.tensors(ranges.device)
    scales = ranges.scales([level_grid(outline).parts for outline in ranges.outlines])
    grid = torch.tensor([1, 0], dtype=torch.int8, device=ranges.device)
    planes = codes.to(ranges.device), nibbles.to(ranges.device)
    return Int12Form(*planes, *scales, grid, places, beyond.to(torch.float32), ranges.basis)


def int12_bytes(weights: int, stored: int) -> int:
    """Bytes of a form at most; a place and a number in 4 bytes each for every level beyond 12 bits."""
    del stored
    return weights + (weights + 1) // 2 + 8 * (weights // _MOST_BEYOND)
