"""Some columns of a matrix to codes, one after the other, each with what the rounding of those before it left."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels import BLOCK
from spectral_surgery.kernels.compile import kernel
from spectral_surgery.kernels.nearest import nearest

Array = npt.NDArray[Any]


@kernel
def feed_lattice(block: Array, square: Array, steps: Array, costs: Array, codes: Array, errors: Array) -> None:
    """Codes that are points of the lattice, in blocks of 32 rows; see `feed_scalar`.

    Args:
        costs: as for `kernels.nearest.nearest`.
    """
    rows, columns = block.shape
    whole, left = rows // BLOCK, rows % BLOCK
    values, levels = np.empty((BLOCK, whole), np.float32), np.empty((BLOCK, whole), np.int32)
    tail, tail_levels = np.empty((left, 1), np.float32), np.empty((left, 1), np.int32)
    ones = np.ones(max(whole, 1), np.float32)
    for column in range(columns):
        inverse = np.float32(1) / steps[column]
        for row in range(rows):
            value = block[row, column] * inverse
            if row < whole * BLOCK:
                values[row % BLOCK, row // BLOCK] = value
            else:
                tail[row - whole * BLOCK, 0] = value
        if whole:
            nearest(values, ones, costs, levels)
        if left:
            nearest(tail, ones, costs, tail_levels)
        for row in range(rows):
            inside = row < whole * BLOCK
            codes[row, column] = levels[row % BLOCK, row // BLOCK] if inside else tail_levels[row - whole * BLOCK, 0]
        _leave(block, square, column, steps[column], np.float32(0), codes, errors)


@kernel
def feed_scalar(
    block: Array, square: Array, steps: Array, dead_zone: float, offset: float, codes: Array, errors: Array
) -> None:
    """Codes of single coefficients.

    Args:
        block: [r, n] float32, C-contiguous, changed: what is left of each column.
        square: [n, n] float32, the part of the factor of `codec.feedback` for these columns.
        steps: [n] float32.
        dead_zone: in steps.
        offset: of the points that codes stand for, in steps.
        codes: [r, n] int32, written.
        errors: [r, n] float32, written: what goes to later columns, times their rows of the factor.
    """
    for column in range(block.shape[1]):
        inverse = np.float32(1) / steps[column]
        for row in range(block.shape[0]):
            value = block[row, column] * inverse
            level = np.int32(max(math.floor(abs(value) - np.float32(dead_zone)) + 1, 0))
            codes[row, column] = level if value >= 0 else -level
        _leave(block, square, column, steps[column], np.float32(offset), codes, errors)


@kernel
def _leave(block: Array, square: Array, column: int, step: Any, offset: Any, codes: Array, errors: Array) -> None:
    rows, columns = block.shape
    inverse = np.float32(1) / square[column, column]
    for row in range(rows):
        level = np.float32(codes[row, column])
        level += offset * np.sign(level)
        error = (block[row, column] - level * step) * inverse
        errors[row, column] = error
        for later in range(column + 1, columns):
            block[row, later] -= error * square[column, later]
