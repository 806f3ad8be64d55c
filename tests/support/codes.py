"""Codes for tests of frames and kernels: integers, and points of the lattice."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[Any]
BLOCK = 32


def integers(rng: np.random.Generator, shape: tuple[int, int], spread: float, dtype: Any = np.int32) -> Codes:
    """[r, I] with heavy tails, of magnitudes around ``spread``."""
    limit = np.iinfo(dtype).max
    return np.clip(np.rint(rng.standard_t(3, shape) * spread), -limit, limit).astype(dtype)


def lattice_points(rng: np.random.Generator, shape: tuple[int, int], spread: float, dtype: Any = np.int32) -> Codes:
    """[r, I] points ``2 m + c``, m of magnitudes around ``spread``, with random words; from the definition."""
    rows, columns = shape
    limit = np.iinfo(dtype).max // 2
    m = np.clip(np.rint(rng.standard_t(3, shape) * spread), -limit, limit - 1).astype(np.int64)
    c = np.zeros(shape, np.int64)
    for top in range(0, rows, BLOCK):
        height = min(BLOCK, rows - top)
        position = np.arange(height)[:, None]
        c[top : top + height] = rng.integers(0, 2, columns)
        for bit in range((height - 1).bit_length()):
            c[top : top + height] ^= rng.integers(0, 2, columns) & position >> bit
        if height == BLOCK:
            m[top] += m[top : top + height].sum(0) & 1
    return (2 * m + c).astype(dtype)
