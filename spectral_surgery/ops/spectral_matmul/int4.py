"""Half a byte a weight, where codes fit: two signed nibbles a byte, unpacked a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.ops.spectral_matmul import integer, triton
from spectral_surgery.ops.spectral_matmul.levels import Grid
from spectral_surgery.ops.spectral_matmul.source import Spectrum, basis_of, code_blocks, fitting_grid
from spectral_surgery.ops.spectral_matmul.workers import Span, in_turn
from spectral_surgery.spectra.codec import Basis, frame_spans
from spectral_surgery.spectra.large import empty_int8

_LOW, _HIGH = -8, 7
_BLOCK = 1 << 20  # weights unpacked at a time: they stay in cache


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

        def rows(span: Span) -> Tensor:
            return integer.product(operand, self._unpacked(self.codes[slice(*span)]))

        return torch.cat(list(in_turn(rows, self._spans())), 1)

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        operand = integer.prepare(g, accuracy, adjoint=True)
        wide = torch.promote_types(operand.dtype, torch.float32)
        out = g.new_zeros((len(g), self.columns), dtype=wide)

        def rows(span: Span) -> Tensor:
            return integer.adjoint(operand.terms(*span), self._unpacked(self.codes[slice(*span)]))

        for part in in_turn(rows, self._spans()):
            out += part
        return out

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8."""
        return self._unpacked(self.codes[rows])

    def _spans(self) -> list[Span]:
        rows, columns = self.shape
        return frame_spans(rows, max(1, _BLOCK // columns))

    def _unpacked(self, packed: Tensor) -> Tensor:
        half = packed.shape[1]
        codes = packed.new_empty((len(packed), self.columns))
        torch.bitwise_left_shift(packed, 4, out=codes[:, :half]).bitwise_right_shift_(4)  # keeps the sign
        torch.bitwise_right_shift(packed[:, : self.columns - half], 4, out=codes[:, half:])
        parts, shift = self.grid.tolist()
        return Grid(parts, shift).levels(codes)


def int4_form(spectrum: Spectrum) -> Int4Form:
    """Nibbles of a spectrum, decoded block by block.

    Raises:
        ConfigError: when its codes do not fit 4 bits, or their offset no int8 grid.
    """
    rows, columns = spectrum.shape
    half = -(-columns // 2)
    packed = empty_int8((rows, half)).to(spectrum.step.device)
    for start, codes in code_blocks(spectrum):
        grid = fitting_grid(spectrum, codes, "int4", (_LOW, _HIGH))
        part = codes.to(torch.int8)
        block = packed[start : start + len(part)]
        block.copy_(part[:, :half] & 15)
        block[:, : columns - half] |= part[:, half:] << 4
    stored = torch.tensor([grid.parts, grid.shift], dtype=torch.int8, device=packed.device)
    return Int4Form(packed, spectrum.step.to(torch.float32) / grid.parts, stored, basis_of(spectrum), columns)
