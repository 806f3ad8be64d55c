"""Y = x Wᵀ for a few tokens on a CPU, as two calls: activations into the spectrum and to integers; products and back.

The weight is a matrix of levels L, int8 or nibbles, in the transformed domain: W = T_outᵀ L diag(scale) T_in. For each
token, c = scale * T_in x is rounded to ``hi + lo / (2 Q)`` times a unit, with integers hi and lo of magnitude Q at most
and the unit |c|_max / Q. Sums of L hi and L lo are exact: a term of a vector adds up two products a chunk, in chunks
of at least 16 terms, so that it stays below 2^31 as long as ``2 * 127 * Q * chunks < 2^31`` (`_largest`). Q is 32767 up
to 4128 terms, and 4096 at 33 thousand.

With both hi and lo, c is as exact as float32. With hi alone, errors of terms are at most half a unit. Their sum is then
at most 2^-9 of the sum of all |c|, as it is where each is rounded to bfloat16; unless a few terms stand out by far:
then ``coarse`` is 1 afterwards, and the caller begins again with both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from spectral_surgery.kernels.compile import c_function, inlined, kernel
from spectral_surgery.kernels.matrix import (
    JOB,
    Array,
    find_outlier,
    floats,
    outlier_place,
    outlier_value,
    read_numbers,
    turn,
    turn_all,
    write_numbers,
)
from spectral_surgery.kernels.threads import next_task, pointer_to
from spectral_surgery.kernels.vectors import (
    BYTES,
    FIVE,
    NIBBLES,
    POINTS,
    TILES,
    TOKENS,
    dots,
    height,
    width,
)


def work_bytes(tokens: int, columns: int) -> int:
    """Bytes of memory that a product works in; integers fill the last chunks, of 64 terms at most, and groups."""
    return 4 * tokens * (columns + 1) + 2 * 2 * (tokens + TOKENS) * (columns + 2 * 64) + _LINE


_LINE = 64  # bytes of the cache; integers begin with one
_SMALL, _LIFT = np.float32(2.0**-60), np.float32(2.0**64)  # activations whose units are hardly normal, times this
_WHOLE = np.float32(1.5 * 2**23)
ROWS = 4  # at most that `dots` takes at once
SOME = 32  # tokens of a task, whole groups: their integers, and a tile of levels, stay in the second cache

_bytes, _nibbles, _points, _five = (dots(kind, 1) for kind in (BYTES, NIBBLES, POINTS, FIVE))
_group_bytes, _group_nibbles, _group_points, _group_five = (
    dots(kind, TOKENS) for kind in (BYTES, NIBBLES, POINTS, FIVE)
)


@kernel
def _parts(job: Any) -> tuple[int, int, int]:
    """Addresses of the parts of the memory to work in: c, units and integers."""
    units = job.work + 4 * job.tokens * job.columns
    return job.work, units, (units + 4 * job.tokens + _LINE - 1) // _LINE * _LINE


@kernel
def largest(size: int, halves: int) -> int:
    """Q: the largest magnitude of integers whose sums with levels of a row stay exact.

    Args:
        size: bytes of a row.
        halves: terms of a byte.
    """
    chunks = -(-size // width())
    most: int = (2**31 - 1) // (2 * 127 * halves * chunks)
    return min(32767, most)


@inlined
def _round_some(values: Array, inverse: np.float32, low: np.float32, out: Array) -> None:
    """Of consecutive terms: `_round`. Numbers below 2^22 lose their fraction where ``_WHOLE`` is added."""
    for place in range(out.size):
        value = values[place] * inverse
        high = (value + _WHOLE) - _WHOLE
        if low > 0:
            high = ((value - high) * low + _WHOLE) - _WHOLE
        out[place] = np.int16(high)


@kernel
def _round(
    inside: Array, inverse: np.float32, numbers: Array, step: Any, size: int, halves: int, low: np.float32
) -> None:
    """Integers of one token, chunk by chunk.

    Args:
        inside: [columns] float32.
        inverse: one over the unit of hi.
        numbers: int16, from the first of this token in the first chunk; written.
        step: from a chunk to the next, in numbers.
        size: bytes of a row of levels.
        halves: terms of a byte; the second ones are ``size`` columns further.
        low: 0 for hi; 2 Q for lo, in units of hi over this.
    """
    span = np.int64(width())
    chunks = -(-size // span)
    for half in range(halves):
        for chunk in range(chunks):
            start = min(chunk * span, size - span)
            skip = chunk * span - start
            to = (chunk * halves + half) * step
            from_ = half * size + start
            count = min(span, inside.size - from_)
            if skip or count < span:
                numbers[to : to + span] = 0
            if skip < count:
                _round_some(inside[from_ + skip : from_ + count], inverse, low, numbers[to + skip : to + count])


@kernel
def _peak(values: Array) -> np.float32:
    """The largest magnitude; what is not finite is larger than all others."""
    most, bits = np.int32(0), values.view(np.int32)
    for place in range(bits.size):
        most = max(most, bits[place] & np.int32(0x7FFFFFFF))  # of positive numbers, in the order of their bits
    if most >= 0x7F800000:
        return np.float32(np.inf)
    return np.float32(np.array([most], np.int32).view(np.float32)[0])


@kernel
def _total(values: Array) -> np.float32:
    """Sum of magnitudes, in eight sums, since one would wait for itself, and as a vector."""
    a = b = c = d = e = f = g = h = np.float32(0)
    whole = values.size // 8 * 8
    for first in range(0, whole, 8):
        some = values[first : first + 8]
        a, b, c, d = a + abs(some[0]), b + abs(some[1]), c + abs(some[2]), d + abs(some[3])
        e, f, g, h = e + abs(some[4]), f + abs(some[5]), g + abs(some[6]), h + abs(some[7])
    for place in range(whole, values.size):
        a += abs(values[place])
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@kernel
def _group(token: int, tokens: int) -> tuple[int, int]:
    """The group of a token: its first one, and how many it has room for."""
    first = token // TOKENS * TOKENS
    return first, 1 if tokens - first == 1 else TOKENS


@c_function
def prepare(pointer: Any) -> None:
    """Activations into the spectrum and to integers; a task is a token. Points to a `matrix.Job`."""
    job = carray(pointer, (1,), JOB)[0]
    columns, halves = job.columns, 1 if job.kind == BYTES else 2
    size = -(-columns // halves)
    span = np.int64(width())
    each = halves * -(-size // span) * span  # numbers of a token
    top = np.float32(largest(size, halves))
    spectrum, units_at, numbers_at = _parts(job)
    units = floats(units_at, job.tokens)
    room = -(-job.tokens // TOKENS) * TOKENS if job.tokens > 1 else 1  # tokens of whole groups
    numbers = carray(pointer_to(numbers_at), (job.planes * room * each,), np.int16)
    scale = floats(job.scale, job.scales)
    while True:
        token = next_task(pointer)
        if token >= job.tokens:
            return
        inside = floats(spectrum + 4 * token * columns, columns)
        read_numbers(job.x + (2 if job.bfloat16 else 4) * token * columns, job.bfloat16, inside)
        lifted = _peak(inside) < _SMALL
        if lifted:
            inside *= _LIFT
        turn_all(inside, job.tile, job.into, job.rest_into)
        if scale.size == 1:
            inside *= scale[0]
        else:
            inside *= scale
        if job.frames:  # levels of which are parts of a step
            inside *= np.float32(1) / np.float32(job.parts)
        peak = _peak(inside)
        if not peak < np.inf:
            job.finite = 0
            return
        unit = max(peak / top, np.float32(1e-38))
        inverse = np.float32(1) / unit
        if peak and columns * unit > np.float32(2.0**-8) * _total(inside):
            job.coarse = 1
        units[token] = -unit if lifted else unit
        first, group = _group(token, job.tokens)
        for plane in range(job.planes):
            some = numbers[(plane * room + first) * each + (token - first) * span :]
            _round(inside, inverse, some, group * span, size, halves, np.float32(2 * plane) * top)


@kernel
def _dots(job: Any, levels: int, group: int, row: int, size: int, x: int, sums: int) -> None:
    """Products of `height()` rows with a group of tokens: [group, rows] sums."""
    kind, parts, shift = job.kind, job.parts, job.shift
    levels, lowest = levels + row * size, job.lowest + row * (size // 8 * 2)
    if group == 1:
        for _ in range(height()):
            if kind == BYTES:
                _bytes(levels, lowest, size, x, sums, parts, shift)
            elif kind == NIBBLES:
                _nibbles(levels, lowest, size, x, sums, parts, shift)
            elif kind == POINTS:
                _points(levels, lowest, size, x, sums, parts, shift)
            else:
                _five(levels, lowest, size, x, sums, parts, shift)
            levels, lowest, sums = levels + size, lowest + size // 8 * 2, sums + 4
    elif kind == BYTES:
        _group_bytes(levels, lowest, size, x, sums, parts, shift)
    elif kind == NIBBLES:
        _group_nibbles(levels, lowest, size, x, sums, parts, shift)
    elif kind == POINTS:
        _group_points(levels, lowest, size, x, sums, parts, shift)
    else:
        _group_five(levels, lowest, size, x, sums, parts, shift)


@kernel
def _add_outliers(job: Any, first: int, start: int, values: Array) -> None:
    """Add what outliers of some rows contribute, in units of the integers.

    Args:
        first: of the rows.
        start: the first token.
        values: [tokens, rows] float32.
    """
    columns, (tokens, rows) = job.columns, values.shape
    spectrum, units_at, _ = _parts(job)
    units = floats(units_at, job.tokens)[start : start + tokens]
    for number in range(find_outlier(job, first), job.outliers):
        place = outlier_place(job, number)
        row, column = place // columns, place % columns
        if row >= first + rows:
            return
        if row < first:  # of a damaged state: not in order
            continue
        for token in range(tokens):
            inside = floats(spectrum + 4 * ((start + token) * columns + column), 1)[0]
            values[token, row - first] += outlier_value(job, number) * inside / abs(units[token])


@kernel
def _finish(job: Any, values: Array, first: int, start: int, tiles: Array) -> None:
    """Sums of integers of rows of a tile to numbers in space, with the bias, and where they belong.

    Args:
        values: [tokens, rows] float32.
        first: of the rows.
        start: the first token.
        tiles: to work in.
    """
    tokens, count = values.shape
    units = floats(_parts(job)[1], job.tokens)[start : start + tokens]  # below 0 of c times `_LIFT`
    row_scale = floats(job.row_scale + 4 * first, count if job.row_scale else 0)
    for token in range(tokens):
        out, unit = values[token], abs(units[token])
        if job.row_scale:
            for place in range(count):
                out[place] *= row_scale[place]
        for place in range(count):
            out[place] *= unit
    matrix = job.back if count == job.row_tile else job.rest_back
    if matrix:
        turn(values.reshape(-1), matrix, count, 0, tokens * count, tiles)
    bias = tiles[:count]
    if job.bias:
        read_numbers(job.bias + (2 if job.bfloat16 else 4) * first, job.bfloat16, bias)
    for token in range(tokens):
        out = values[token]
        if units[token] < 0:
            out *= np.float32(1 / _LIFT)
        if job.bias:
            for place in range(count):
                out[place] += bias[place]
        write_numbers(out, job.y + (2 if job.bfloat16 else 4) * ((start + token) * job.rows + first), job.bfloat16)


@inlined
def _add_whole(sums: Array, unit: np.float32, values: Array, token: int, row: int) -> None:
    """Add sums of `TOKENS` and `height()` rows; with counts that are known, this is a few vector instructions."""
    flat, columns = values.reshape(-1), np.uint64(values.shape[1])
    to = np.uint64(token) * columns + np.uint64(row)
    for other in range(TOKENS):
        for place in range(int(height())):
            flat[to + np.uint64(other) * columns + np.uint64(place)] += unit * sums[other * int(height()) + place]


@kernel
def multiply_tile(job: Any, levels: int, first: int, last: int, start: int, room: Array) -> None:
    """Products of rows of a tile with up to `SOME` tokens, and back into space.

    Args:
        levels: address of those of row 0, where those of these rows are reckoned from.
        first: of the rows.
        last: after the rows.
        start: the first token, a multiple of `SOME`.
        room: [`tile_room`] float32, to work in.
    """
    tokens, rows, columns, halves = job.tokens, job.rows, job.columns, 1 if job.kind == BYTES else 2
    size = -(-columns // halves)
    span, most = int(width()), int(height())
    each = halves * -(-size // span) * span
    places = -(-tokens // TOKENS) * TOKENS if tokens > 1 else 1
    fine = np.float32(0.5) / np.float32(largest(size, halves))  # of lo
    numbers, stop = _parts(job)[2], min(start + SOME, tokens)
    sums, room = room[: ROWS * TOKENS], room[ROWS * TOKENS :]
    size_of = (stop - start) * (last - first)
    values = room[:size_of].reshape(stop - start, last - first)
    values[:] = 0
    for row in range(first, last, most):
        begin = min(row, rows - most)  # the last rows again, where there are not enough others
        for plane in range(job.planes):
            unit, token = fine if plane else np.float32(1), start
            while token < stop:
                _, group = _group(token, tokens)
                x = numbers + 2 * (plane * places + token) * each
                _dots(job, levels, group, begin, size, x, sums.ctypes.data)
                if row + most <= last and token + TOKENS <= stop:
                    _add_whole(sums, unit, values, token - start, row - first)
                else:
                    for other in range(min(group, stop - token)):
                        for place in range(row, min(row + most, last)):
                            values[token + other - start, place - first] += unit * sums[other * most + place - begin]
                token += group
    if job.outliers:
        _add_outliers(job, first, start, values)
    _finish(job, values, first, start, room[size_of:])


@kernel
def tile_room(job: Any) -> int:
    """Numbers that `multiply_tile` works in: sums, values, and tiles that are transformed."""
    count: int = ROWS * TOKENS + (min(job.tokens, SOME) + TILES) * job.row_tile
    return count


@c_function
def multiply(pointer: Any) -> None:
    """Products, and back into space; a task is a tile of rows, and some tokens. Points to what `prepare` has seen."""
    job = carray(pointer, (1,), JOB)[0]
    room, parts = np.empty(tile_room(job), np.float32), -(-job.tokens // SOME)
    while True:
        task = next_task(pointer)
        first = task // parts * job.row_tile
        if first >= job.rows:
            return
        multiply_tile(job, job.levels, first, min(first + job.row_tile, job.rows), task % parts * SOME, room)
