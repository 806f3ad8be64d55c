"""Products of a few tokens with a sparse matrix whose entries come in the order of its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels.compile import kernel

Array = npt.NDArray[Any]


@kernel
def add_product(y: Array, x: Array, places: Array, values: Array) -> None:
    """Y + X Sᵀ, in place; see `matmul.outliers.add_product`.

    Args:
        y: [T, O] float32, changed.
        x: [I, T] float32, C-contiguous: rows of a power of two apart would share a few lines of the cache.
        places: [n] integers, row * I + column, ascending.
        values: [n] of any type, the entries.
    """
    columns, tokens = x.shape
    sums = np.zeros(tokens, np.float32)
    row, end = 0, columns
    for number in range(len(places)):
        place = places[number]
        if place >= end:
            for token in range(tokens):
                y[token, row] += sums[token]
                sums[token] = 0
            while place >= end:
                row += 1
                end += columns
        column, value = place - end + columns, np.float32(values[number])
        for token in range(tokens):
            sums[token] += x[column, token] * value
    for token in range(tokens):
        y[token, row] += sums[token]
