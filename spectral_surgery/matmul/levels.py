"""Reconstruction points as integers: codes q stand for sign(q) (|q| + offset), which an int8 grid can hold exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from spectral_surgery.codec.quantized import INT8_MAX

_ON_GRID = 3e-7  # relative: files hold the offset as float32


@dataclass(frozen=True)
class Grid:
    """An integer grid: level = parts * q + sign(q) * shift stands for sign(q) (|q| + shift / parts).

    Attributes:
        parts: of a step.
        shift: the offset, in those parts.
    """

    parts: int
    shift: int

    def fits(self, low: int, high: int) -> bool:
        """Whether every code from low to high has a level that int8 holds."""
        return self.parts * max(-low, high) + max(self.shift, 0) <= INT8_MAX

    def levels_(self, codes: Tensor) -> Tensor:
        """Int8 codes that fit to int8 levels, in place."""
        if self.parts != 1:
            codes.mul_(self.parts)
        return codes.add_(torch.sign(codes), alpha=self.shift) if self.shift else codes

    def levels(self, codes: Tensor) -> Tensor:
        """Int8 codes that fit to int8 levels; the codes themselves where they are their levels."""
        if self.parts == 1 and not self.shift:
            return codes
        return self.levels_(codes.clone())


@lru_cache(maxsize=1024)
def grid_of(offset: float) -> Grid | None:
    """The coarsest grid with the offset on it; None when no grid that fits int8 has it."""
    for parts in range(1, INT8_MAX + 1):
        shift = round(offset * parts)
        if abs(offset * parts - shift) <= _ON_GRID * parts * max(1.0, abs(offset)):
            return Grid(parts, shift)
    return None


def levels_of(codes: Tensor, offset: float) -> tuple[Tensor, float]:
    """Codes to what products are taken with.

    Returns (levels, parts): int8 levels in parts of a step where they fit, else float32 levels in steps (parts 1).

    Args:
        codes: [r, I] int8, int16 or int32.
        offset: shift of the reconstruction points, in steps.
    """
    grid = grid_of(offset)
    if grid == Grid(1, 0) and codes.dtype == torch.int8:
        return codes, 1.0
    if grid is not None:
        low, high = (int(v) for v in torch.aminmax(codes))
        if grid.fits(low, high):
            return grid.levels(codes.to(torch.int8)), float(grid.parts)
    values = codes.to(torch.float32)
    return values.add_(torch.sign(values), alpha=offset), 1.0
