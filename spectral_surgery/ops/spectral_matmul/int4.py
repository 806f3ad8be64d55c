"""Half a byte a weight, where codes fit: two signed nibbles a byte, unpacked a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.ops.spectral_matmul import integer, triton
from spectral_surgery.ops.spectral_matmul.levels import Grid
from spectral_surgery.ops.spectral_matmul.source import Spectrum, basis_of, code_blocks, fitting_grid
from spectral_surgery.spectra.codec import Basis, frame_spans
from spectral_surgery.spectra.large import empty

_LOW, _HIGH = -8, 7
_BLOCK = 1 << 22  # weights unpacked at a time: few calls of all threads, and 4 MiB


@dataclass(frozen=True)
class Int4Form:
    """Codes as nibbles; see `Form`.

    Attributes:
        codes: [O, ceil(I / 2)] int8: the low nibbles are the first half of the columns, the high ones the rest.
        scale: [1] or [I] float32.
        basis: transform, tile and axes.
        grid: [2] int8, `Grid` of the reconstruction points: parts and shift.
        columns: I.
    """

    codes: Tensor
    scale: Tensor
    grid: Tensor
    basis: Basis
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (self.codes.shape[0], self.columns)

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        operand = integer.prepare(x, accuracy)
        if operand.how == "triton":
            return triton.packed_product(operand.x, self.codes, self.grid)
        return torch.cat([integer.product(operand, levels) for _, levels in self._blocks()], 1)

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        operand = integer.prepare(g, accuracy, adjoint=True)
        wide = torch.promote_types(operand.dtype, torch.float32)
        out = g.new_zeros((len(g), self.columns), dtype=wide)
        for start, levels in self._blocks():
            out += integer.adjoint(operand.terms(start, start + len(levels)), levels)
        return out

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8."""
        packed = self.codes[rows]
        return self._unpack(packed, packed.new_empty((len(packed), self.columns)))

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and levels of blocks of rows, one after the other in the same memory."""
        rows, columns = self.shape
        spans = frame_spans(rows, max(1, _BLOCK // columns))
        buffer = self.codes.new_empty((spans[0][1], columns))
        for start, stop in spans:
            yield start, self._unpack(self.codes[start:stop], buffer[: stop - start])

    def _unpack(self, packed: Tensor, out: Tensor) -> Tensor:
        half = packed.shape[1]
        torch.bitwise_left_shift(packed, 4, out=out[:, :half]).bitwise_right_shift_(4)  # keeps the sign
        torch.bitwise_right_shift(packed[:, : self.columns - half], 4, out=out[:, half:])
        parts, shift = self.grid.tolist()
        return Grid(parts, shift).levels_(out)


def int4_form(spectrum: Spectrum) -> Int4Form:
    """Nibbles of a spectrum, decoded block by block.

    Raises:
        ConfigError: when its codes do not fit 4 bits, or their offset no int8 grid.
    """
    rows, columns = spectrum.shape
    half = -(-columns // 2)
    packed = empty((rows, half), torch.int8).to(spectrum.step.device)
    for start, codes in code_blocks(spectrum):
        grid = fitting_grid(spectrum, codes, "int4", (_LOW, _HIGH))
        part = codes.to(torch.int8)
        block = packed[start : start + len(part)]
        block.copy_(part[:, :half] & 15)
        block[:, : columns - half] |= part[:, half:] << 4
    stored = torch.tensor([grid.parts, grid.shift], dtype=torch.int8, device=packed.device)
    return Int4Form(packed, spectrum.step.to(torch.float32) / grid.parts, stored, basis_of(spectrum), columns)
