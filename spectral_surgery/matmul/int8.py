"""One byte a weight: the levels themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.codec.quantized import INT8_MAX
from spectral_surgery.matmul import integer
from spectral_surgery.matmul.code_blocks import Spectrum, basis_of, code_blocks, fitting_grid


@dataclass(frozen=True)
class Int8Form:
    """Levels as an int8 matrix; see `Form`.

    Attributes:
        codes: [O, I] int8 levels.
        scale: [1] or [I] float32.
        basis: transform, tile and axes.
    """

    codes: Tensor
    scale: Tensor
    basis: Basis

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        return integer.product(integer.prepare(x, accuracy), self.codes)

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        return integer.adjoint(integer.prepare(g, accuracy), self.codes)

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8."""
        return self.codes[rows]

    def recorded_levels(self) -> Tensor:
        """[O, I] int8."""
        return self.codes


def int8_form(spectrum: Spectrum) -> Int8Form:
    """Levels of a spectrum, decoded block by block.

    Raises ConfigError when its codes or their offset do not fit int8.
    """
    levels = empty(spectrum.shape, torch.int8).to(spectrum.step.device)
    for start, codes in code_blocks(spectrum, levels):
        grid = fitting_grid(spectrum, codes, "int8", (-INT8_MAX, INT8_MAX))
        block = levels[start : start + len(codes)]
        if codes.data_ptr() != block.data_ptr():
            block.copy_(codes)
        grid.levels_(block)
    return Int8Form(levels, spectrum.step.to(torch.float32) / grid.parts, basis_of(spectrum))


def transposed_form(forms: Sequence[Int8Form]) -> Int8Form | None:
    """The form of Vᵀ from those of row ranges of V, so that its rows serve kernels that have rows only.

    Returns one form, or None where tiles, transforms or scales do not allow it.

    Args:
        forms: of consecutive row ranges.
    """
    basis = forms[0].basis
    cut = [form.shape[0] for form in forms[:-1]]
    aligned = 0 not in basis.axes or not any(rows % basis.tile for rows in cut)
    if not aligned or any(form.basis != basis or form.scale.numel() != 1 for form in forms):
        return None
    codes = torch.cat([form.codes.T for form in forms], 1).contiguous()
    scale = torch.cat([form.scale.expand(form.shape[0]) for form in forms])
    axes = tuple(sorted(1 - axis for axis in basis.axes))
    return Int8Form(codes, scale, Basis(basis.transform, basis.tile, axes))
