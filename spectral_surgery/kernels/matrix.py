"""What kernels are told of a matrix of levels and of what they do with it, and the steps that several of them share."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from spectral_surgery.kernels.compile import kernel
from spectral_surgery.kernels.threads import pointer_to
from spectral_surgery.kernels.vectors import SPAN, TILES, add_row_times, add_rows_times, tiles_at_once

FIELDS = (
    "counter",  # 0 at first
    "tokens",  # or rows that are asked for
    "rows",
    "columns",
    "kind",  # of levels; see `dots`
    "parts",  # of the grid of nibbles
    "shift",
    "planes",  # 1 for hi, 2 for hi and lo
    "finite",  # 1 at first; 0 afterwards where c is not
    "coarse",  # 0 at first; 1 afterwards where hi alone is not exact enough for bfloat16
    "bfloat16",  # whether x, y and bias are bfloat16; else they are float32
    "x",  # addresses from here: [tokens, columns], or numbers of rows [tokens] int64
    "y",  # [tokens, rows], or rows [tokens, columns]
    "levels",  # [rows, columns] int8, or [rows, ceil(columns / 2)]
    "lowest",  # [rows, columns / 8] uint8 of FIVE
    "scales",  # how many: 1, or columns
    "scale",  # float32
    "row_scale",  # [rows] float32, or 0
    "bias",  # [rows] as x and y, or 0
    "work",  # `work_bytes` of memory, written: c [tokens, columns] float32, units [tokens] float32, integers
    "outliers",  # how many
    "wide_places",  # whether places are int64; else int32
    "places",  # row * columns + column, ascending
    "wide_beyond",  # whether what they go beyond the matrix by is float32; else int8
    "beyond",
    "tile",  # of columns
    "into",  # [tile, tile] float32 that tiles of x are multiplied by, or 0
    "rest_into",  # of the columns beyond whole tiles, or 0
    "row_tile",
    "frames",  # how many, where levels are not in memory but coded
    "most_rows",  # of a frame
    "data",  # all frames
    "ends",  # [frames + 1] int64, in bytes of the data
    "starts",  # [frames + 1] int64, rows
    "back",  # [row_tile, row_tile] float32 that tiles of the product are multiplied by, or 0
    "rest_back",
)

Array = npt.NDArray[Any]


class Job(ctypes.Structure):
    """A number or an address for every field; those that a kernel does not need are 0."""

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


JOB = np.dtype([(name, np.int64) for name in FIELDS])


@kernel
def floats(address: int, count: int) -> Array:
    """Numbers at an address, float32."""
    values: Array = carray(pointer_to(address), (count,), np.float32)
    return values


@kernel
def turn(inside: Array, matrix: int, points: int, start: int, stop: int, tiles: Array) -> None:
    """Multiply tiles of [start, stop) by a matrix, in place.

    Args:
        tiles: [TILES * points] float32, to work in.
    """
    weights = carray(pointer_to(matrix), (points, points), np.float32)
    whole = points // SPAN * SPAN
    first, many = start, tiles_at_once() * points
    while whole == points and first + many <= stop:
        for point in range(0, whole, SPAN):
            add_rows_times(inside.ctypes.data + 4 * first, matrix, points, point, tiles.ctypes.data)
        inside[first : first + many] = tiles[:many]
        first += many
    for tile in range(first, stop, points):
        for point in range(0, whole, SPAN):
            add_row_times(inside.ctypes.data + 4 * tile, matrix, points, point, tiles.ctypes.data)
        tiles[whole:points] = 0
        for term in range(points if whole < points else 0):
            value = inside[tile + term]
            for point in range(whole, points):
                tiles[point] += value * weights[term, point]
        inside[tile : tile + points] = tiles[:points]


@kernel
def turn_all(inside: Array, tile: int, matrix: int, rest_matrix: int) -> None:
    """Transform whole tiles, and those terms that are left."""
    whole = inside.size // tile * tile
    tiles = np.empty(TILES * tile, np.float32)
    if matrix:
        turn(inside, matrix, tile, 0, whole, tiles)
    if rest_matrix and whole < inside.size:
        turn(inside, rest_matrix, inside.size - whole, whole, inside.size, tiles)


@kernel
def read_numbers(address: int, bfloat16: int, out: Array) -> None:
    """Numbers at an address, bfloat16 or float32, to float32."""
    if bfloat16:
        halves = carray(pointer_to(address), (out.size,), np.uint16)
        bits = out.view(np.uint32)
        for place in range(out.size):
            bits[place] = np.uint32(halves[place]) << np.uint32(16)
    else:
        out[:] = floats(address, out.size)


@kernel
def write_numbers(values: Array, address: int, bfloat16: int) -> None:
    """Store float32, rounded to the nearest, ties to even; what is not a number stays none."""
    if bfloat16:
        halves = carray(pointer_to(address), (values.size,), np.uint16)
        bits = values.view(np.uint32)
        for place in range(values.size):
            word = bits[place]
            even = (word >> np.uint32(16)) & np.uint32(1)
            rounded = (word + np.uint32(0x7FFF) + even) >> np.uint32(16)
            halves[place] = np.uint16(rounded if values[place] == values[place] else np.uint32(0x7FC0))
    else:
        floats(address, values.size)[:] = values


@kernel
def outlier_place(job: Any, number: int) -> int:
    """Row * columns + column of an outlier."""
    if job.wide_places:
        return int(carray(pointer_to(job.places), (job.outliers,), np.int64)[number])
    return int(carray(pointer_to(job.places), (job.outliers,), np.int32)[number])


@kernel
def outlier_value(job: Any, number: int) -> np.float32:
    """What the level of an outlier goes beyond that of the matrix by."""
    if job.wide_beyond:
        return np.float32(carray(pointer_to(job.beyond), (job.outliers,), np.float32)[number])
    return np.float32(carray(pointer_to(job.beyond), (job.outliers,), np.int8)[number])


@kernel
def find_outlier(job: Any, row: int) -> int:
    """The first outlier of this row or a later one."""
    low, high = 0, job.outliers
    while low < high:
        middle = (low + high) // 2
        if outlier_place(job, middle) < row * job.columns:
            low = middle + 1
        else:
            high = middle
    return int(low)
