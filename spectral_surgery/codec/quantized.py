"""A spectrum as integer codes: what is stored, and what compressed layers multiply with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.errors import ShapeError
from spectral_surgery.transforms import TRANSFORMS, tiles

INT8_MAX = 127
INT12_MAX = 16 * INT8_MAX + 7  # of what is held as an int8 number and a signed nibble


@dataclass(frozen=True)
class QuantizedSpectrum:
    """Integer codes of the spectrum of a matrix, in matrix order.

    A coefficient is ``sign(q) * (|q| + offset) * step``. The offset puts reconstruction points at centroids. It is a
    multiple of ``1 / grid``, so that a spectrum with ``grid > 0`` is exactly an int8 matrix times ``step / grid``.

    Attributes:
        codes: [O, I] int8, int16 or int32.
        step: [1] float32, or [I] float32 for one step per column.
        offset: shift of the reconstruction points, in steps.
        transform: name in TRANSFORMS.
        tile: side of the tiles.
        axes: transformed axes, 0 for O and 1 for I.
    """

    codes: Tensor
    step: Tensor
    offset: float
    transform: str
    tile: int
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def coefficients(self) -> Tensor:
        """The spectrum itself: [O, I] float32."""
        return dequantize(self.codes, self.step, self.offset)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix: [O, I], inverse-transformed in float32 and cast once."""
        dense = tiles.inverse(self.coefficients(), TRANSFORMS[self.transform], self.tile, self.axes)
        return dense.to(dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``start`` to ``stop`` of `to_dense`, from the rows of tiles that hold them: [stop - start, I].

        Raises ShapeError when the rows are not within the matrix.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise ShapeError(f"rows: {start}:{stop} of {self.shape[0]} rows; expected 0 <= start <= stop <= rows.")
        first = start // self.tile * self.tile
        last = min(-(-stop // self.tile) * self.tile, self.shape[0])
        part = dequantize(self.codes[first:last], self.step, self.offset)
        dense = tiles.inverse(part, TRANSFORMS[self.transform], self.tile, self.axes)
        return dense[start - first : stop - first].to(dtype)


@dataclass(frozen=True)
class Moments:
    """Sums over the kept coefficients of a matrix that fix its reconstruction points; they add over its parts."""

    kept: float
    level: float
    level_square: float
    product: float
    magnitude: float

    def __add__(self, other: Moments) -> Moments:
        """Moments of two parts together."""
        return Moments(
            self.kept + other.kept,
            self.level + other.level,
            self.level_square + other.level_square,
            self.product + other.product,
            self.magnitude + other.magnitude,
        )

    def energy(self, step: float, offset: float) -> float:
        """Squared norm of the coefficients reconstructed with this step and offset."""
        return step**2 * (self.level_square + 2 * offset * self.level + offset**2 * self.kept)


def dequantize(codes: Tensor, step: Tensor, offset: float) -> Tensor:
    """Codes to coefficients: [O, I] integers to [O, I] float32."""
    values = codes.to(torch.float32)
    if offset:
        values += torch.sign(values) * offset
    return values.mul_(step)


def grid(largest: int, offset: float, most: int = INT8_MAX) -> int:
    """Finest integer grid, in parts of a step, on which no reconstruction point exceeds ``most``; 0 when none does."""
    return most // (largest + max(math.ceil(offset), 0))
