"""Some rows of a matrix of levels: the levels themselves, or the rows of the weight, as an embedding looks them up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from spectral_surgery.kernels.compile import c_function, kernel
from spectral_surgery.kernels.matrix import JOB, Array, find_outlier, floats, outlier_place, outlier_value, turn_all
from spectral_surgery.kernels.threads import next_task, pointer_to
from spectral_surgery.kernels.vectors import BYTES, FIVE, FLOAT32, INT8, NIBBLES, POINTS, rows_of

_bytes_int8, _nibbles_int8, _points_int8, _five_int8 = (rows_of(kind, INT8) for kind in (BYTES, NIBBLES, POINTS, FIVE))
_bytes_float, _nibbles_float, _points_float, _five_float = (
    rows_of(kind, FLOAT32) for kind in (BYTES, NIBBLES, POINTS, FIVE)
)


@kernel
def _read(job: Any, row: int, as_float: bool, out: int) -> None:
    """Levels of a row, without outliers, to an address."""
    size = job.columns if job.kind == BYTES else job.columns // 2
    levels, lowest = job.levels + row * size, job.lowest + row * (size // 8 * 2)
    if job.kind == BYTES:
        if as_float:
            _bytes_float(levels, lowest, size, job.parts, job.shift, out)
        else:
            _bytes_int8(levels, lowest, size, job.parts, job.shift, out)
    elif job.kind == NIBBLES:
        if as_float:
            _nibbles_float(levels, lowest, size, job.parts, job.shift, out)
        else:
            _nibbles_int8(levels, lowest, size, job.parts, job.shift, out)
    elif job.kind == POINTS:
        if as_float:
            _points_float(levels, lowest, size, job.parts, job.shift, out)
        else:
            _points_int8(levels, lowest, size, job.parts, job.shift, out)
    elif as_float:
        _five_float(levels, lowest, size, job.parts, job.shift, out)
    else:
        _five_int8(levels, lowest, size, job.parts, job.shift, out)


@kernel
def _add_outliers(job: Any, row: int, levels: Array) -> None:
    """Add what levels of a row go beyond those of the matrix."""
    if not job.outliers:
        return
    for number in range(find_outlier(job, row), job.outliers):
        column = outlier_place(job, number) - row * job.columns
        if column >= job.columns:
            return
        if column < 0:  # of a damaged state: not in order
            continue
        levels[column] += outlier_value(job, number)


@c_function
def read_levels(pointer: Any) -> None:
    """Levels of rows as int8, without outliers; a task is a row. Points to a `matrix.Job`."""
    job = carray(pointer, (1,), JOB)[0]
    numbers = carray(pointer_to(job.x), (job.tokens,), np.int64)
    while True:
        task = next_task(pointer)
        if task >= job.tokens:
            return
        _read(job, numbers[task], False, job.y + task * job.columns)


@c_function
def look_up(pointer: Any) -> None:
    """Rows of the weight as float32, each from all rows of its tile; a task is a row. Points to a `matrix.Job`.

    ``back`` is what a product would be turned back by, ``into`` what columns are turned back by.
    """
    job = carray(pointer, (1,), JOB)[0]
    columns = job.columns
    numbers = carray(pointer_to(job.x), (job.tokens,), np.int64)
    scale, levels = floats(job.scale, job.scales), np.empty(columns, np.float32)
    while True:
        task = next_task(pointer)
        if task >= job.tokens:
            return
        row, out = numbers[task], floats(job.y + 4 * task * columns, columns)
        first = row // job.row_tile * job.row_tile
        points = min(job.row_tile, job.rows - first)
        matrix = job.back if points == job.row_tile else job.rest_back
        out[:] = 0
        for other in range(points if matrix else 1):
            here = first + other if matrix else row
            share = floats(matrix + 4 * (other * points + row - first), 1)[0] if matrix else np.float32(1)
            if job.row_scale:
                share *= floats(job.row_scale, job.rows)[here]
            _read(job, here, True, levels.ctypes.data)
            _add_outliers(job, here, levels)
            for place in range(columns):
                out[place] += share * levels[place]
        if scale.size == 1:
            out *= scale[0]
        else:
            out *= scale
        turn_all(out, job.tile, job.into, job.rest_into)
