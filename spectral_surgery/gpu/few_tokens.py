# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917, RUF005 - Triton has no starred tuples
"""Y = X Wᵀ of a few tokens from levels in planes of bytes, nibbles and bits, with the transforms of both sides.

A program makes BLOCKS times R rows of the product and goes along the terms, two tiles of K columns at a time. The
activations of these are transformed by a small matrix and become digits of eight bits, in units of about their largest:
two digits, or three for float32, hold them to 2^-15 or 2^-23 of it. Digits and levels meet in the int8 matrix unit as
they are: to make floating-point numbers of the levels would take longer than to read them. Two digits of a token lie
beside each other, so that one product has both, and sums are exact: at most 2 * 128 * 128 * 127 * 255 < 2^31.

Where rows alone do not fill the chip, several programs share the terms of the same rows, and the last of them to finish
adds up what the others left, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_surgery.gpu.levels import level_sums, load_planes, times
from spectral_surgery.gpu.parts import matrix_of, outliers, store, tile, transformed

_BASE = tl.constexpr(254)  # of digits: what rounding left of one is half at most
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a number added to it is rounded to an integer, which is in its low bits
# bits of float32 numbers, whose exponents begin at bit 23
_UP = tl.constexpr((1 << 23) // 64 + (1 << 23) - 1)  # by 1/64, and over the next power of two unless it is one
_LEAST = tl.constexpr(24 << 23)  # of what units are made of: those of smaller ones would not be normal numbers
_MOST = tl.constexpr(254 << 23)  # of numbers that have a unit: 2^127
_EXPONENT = tl.constexpr(255 << 23)
_DOWN = tl.constexpr(7 << 23)  # a 128th
_INVERSE = tl.constexpr(254 << 23)  # less the bits of a power of two: those of its inverse
_AHEAD = tl.constexpr(8)  # programs whose sums are loaded at once


@triton.jit
def few_tokens(x, codes, lowest, forward, inverse, scale, row_scale, bias, places, beyond, starts, partial, counters, y, tokens, rows, terms, width, x0, T: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr, SPLITS: tl.constexpr, DIGITS: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, FORWARD: tl.constexpr, INVERSE: tl.constexpr, OFFSET: tl.constexpr, RAGGED: tl.constexpr, PER_COLUMN: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, OUTLIERS: tl.constexpr, BACKEND: tl.constexpr):  # fmt: skip  # noqa: E501
    """Blocks of R rows and some of the terms; `spectral_surgery.matmul.on_gpu` knows what fits together.

    Args:
        x: [tokens, terms] with rows x0 apart; at most T tokens.
        codes: [rows, bytes of a row] int8, contiguous, the first plane of `matmul.planes.LAYOUTS`.
        lowest: [rows, bytes of a row], the second plane.
        forward: [6, K, K]: what activations are multiplied by; see `_spectrum`.
        inverse: [2, SIDE, SIDE]: the same of rows of the product, and of the last ones.
        scale: [1] or [terms] float32.
        row_scale: [rows] float32.
        bias: [rows].
        places: [n], row * terms + column of outliers, ascending.
        beyond: [n] what they go beyond their levels by.
        starts: [blocks + 1], the first outlier of each block of rows.
        partial: [groups, SPLITS, T, BLOCKS * R] float32, for sums of some of the terms.
        counters: [groups] int32, zeros, and zeros again afterwards.
        y: [tokens, rows], contiguous.
        width: columns that are read one after the other: with NIBBLES, columns k and width + k are read together.
    """
    group, split = tl.program_id(0), tl.program_id(1)
    interpreted: tl.constexpr = BACKEND == "interpreter"
    turn: tl.constexpr = K if NIBBLES else 2 * K
    apart = width if NIBBLES else K
    block_row, token = tl.arange(0, R), tl.arange(0, T)
    totals = _zeros(BLOCKS, R, T)
    each = tl.cdiv(tl.cdiv(width, turn), SPLITS)
    matrix = matrix_of(forward, 0, K, FORWARD and not RAGGED)
    for number in range(split * each, tl.minimum((split + 1) * each, tl.cdiv(width, turn))):
        column = number * turn + tl.arange(0, K)
        first, second = _spectrum(x, matrix, forward, token, number * turn, tokens, terms, apart, x0, K, FORWARD, OFFSET, RAGGED, interpreted)  # fmt: skip  # noqa: E501
        if PER_COLUMN:
            first *= tl.load(scale + column, mask=column < terms, other=0.0)[:, None]
            second *= tl.load(scale + column + apart, mask=column + apart < terms, other=0.0)[:, None]
        unit, inverse_unit = _unit(first, second)
        first, first_third = _digits(first, inverse_unit, DIGITS)
        second, second_third = _digits(second, inverse_unit, DIGITS)
        unit *= 1 / (_BASE * times(NIBBLES, BITS, PARTS, SHIFT))
        added = ()
        for block in tl.static_range(BLOCKS):
            row = (group * BLOCKS + block) * R + block_row
            added = added + (_block(codes, lowest, row, column, rows, width, apart, terms, first, second, first_third, second_third, unit, totals[block], DIGITS, BYTES, NIBBLES, BITS, PARTS, SHIFT, BACKEND),)  # fmt: skip  # noqa: E501
        totals = added
    together: tl.constexpr = BLOCKS * R
    left = partial + group.to(tl.int64) * (SPLITS * T * together)
    for block in tl.static_range(BLOCKS):
        total = totals[block]
        if OUTLIERS:
            total = outliers(x, places, beyond, starts, forward, scale, group * BLOCKS + block, split, 0, total, tokens, terms, x0, K, SPLITS, FORWARD, PER_COLUMN, interpreted)  # fmt: skip  # noqa: E501
        to = left + (split * T + token[None, :]) * together + block * R + block_row[:, None]
        tl.store(to, total, mask=((token < tokens)[None, :]) & (block_row < R)[:, None])
    tl.debug_barrier()  # all threads have stored before one of them counts, or others read
    last = True
    if SPLITS > 1:
        last = tl.atomic_add(counters + group, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counters + group, 0)
    if last:
        for number in range(together // SIDE):
            _finish(left + number * SIDE, inverse, scale, row_scale, bias, y, group * together + number * SIDE, token, tokens, rows, together, SPLITS, SIDE, INVERSE, PER_COLUMN, PER_ROW, BIAS, interpreted)  # fmt: skip  # noqa: E501


@triton.jit
def _zeros(BLOCKS: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(BLOCKS):
        zeros = zeros + (tl.zeros((R, T), tl.float32),)
    return zeros


@triton.jit
def _unit(first, second):
    """A power of two for each token that its values have 126 of at most, and its inverse.

    NaN where one is 2^127 or more. Bits of numbers without sign are ordered as these are, with NaN above infinity.
    """
    largest = tl.maximum(first.to(tl.int32, bitcast=True) & 0x7FFFFFFF, second.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(largest, 0)
    power = tl.maximum((largest + _UP) & _EXPONENT, _LEAST)
    bits = power - _DOWN
    inverse = (-bits + _INVERSE).to(tl.float32, bitcast=True)
    return tl.where(largest < _MOST, bits.to(tl.float32, bitcast=True), float("nan")), inverse


@triton.jit
def _digits(values, inverse_unit, DIGITS: tl.constexpr):
    """Two digits of each number beside each other, [K, 2 T] int8, and the third, [K, T], if there is one."""
    raised = values * inverse_unit[None, :] + _ROUND
    rest = (values * inverse_unit[None, :] - (raised - _ROUND)) * _BASE
    lowered = rest + _ROUND
    pair = _low_byte(tl.join(raised, lowered).reshape(values.shape[0], 2 * values.shape[1]))
    return pair, _low_byte((rest - (lowered - _ROUND)) * _BASE + _ROUND) if DIGITS == 3 else 0


@triton.jit
def _low_byte(values):
    return values.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _block(codes, lowest, row, column, rows, width, apart, terms, first, second, first_third, second_third, unit, total, DIGITS: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, BACKEND: tl.constexpr):  # fmt: skip  # noqa: E501
    """Total, [R, T], with what K bytes of its rows add to it."""
    one, two, nibbles = load_planes(codes, lowest, row, column, rows, width, apart, terms, BYTES, NIBBLES, BITS)
    pairs = level_sums(one, two, nibbles, first, second, BYTES, NIBBLES, BITS, PARTS, SHIFT, BACKEND)
    high, low = tl.split(pairs.reshape(total.shape[0], total.shape[1], 2))
    if BYTES and NIBBLES:  # beyond what 32 bits hold
        total += (high.to(tl.float32) * _BASE + low.to(tl.float32)) * unit[None, :]
    else:
        total += (high * _BASE + low).to(tl.float32) * unit[None, :]
    if DIGITS == 3:
        third = level_sums(one, two, nibbles, first_third, second_third, BYTES, NIBBLES, BITS, PARTS, SHIFT, BACKEND)
        total += third.to(tl.float32) * (unit * (1 / _BASE))[None, :]
    return total


@triton.jit
def _finish(left, inverse, scale, row_scale, bias, y, first, token, tokens, rows, TOGETHER: tl.constexpr, SPLITS: tl.constexpr, SIDE: tl.constexpr, INVERSE: tl.constexpr, PER_COLUMN: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Add up what programs left for SIDE rows, scale it, transform it back and store it."""
    row = first + tl.arange(0, SIDE)
    live_row, live_token = row < rows, token < tokens
    at = token[None, :] * TOGETHER + tl.arange(0, SIDE)[:, None]
    total = tl.zeros((SIDE, token.shape[0]), tl.float32)
    for split in range(0, SPLITS, _AHEAD):
        for number in tl.static_range(_AHEAD):
            share = left + (split + number) * (TOGETHER * token.shape[0])
            live = live_row[:, None] & (live_token & (split + number < SPLITS))[None, :]
            total += tl.load(share + at, mask=live, other=0.0, cache_modifier=".cg")
    if not PER_COLUMN:
        total *= tl.load(scale)
    if PER_ROW:
        total *= tl.load(row_scale + row, mask=live_row, other=0.0)[:, None]
    if INVERSE:
        matrix = matrix_of(inverse, (first // SIDE == (rows - 1) // SIDE).to(tl.int32), SIDE, True)
        total = transformed(matrix, total, INTERPRETED)
    if BIAS:
        total += tl.load(bias + row, mask=live_row, other=0.0).to(tl.float32)[:, None]
    to = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    store(to, total, live_row[:, None] & live_token[None, :], INTERPRETED)


@triton.jit
def _spectrum(x, matrix, forward, token, start, tokens, terms, apart, x0, K: tl.constexpr, FORWARD: tl.constexpr, OFFSET: tl.constexpr, RAGGED: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Coefficients of K columns from the start, and of as many ``apart`` from it: each [K, T] float32.

    ``matrix`` transforms a whole tile. Where RAGGED, matrices are loaded from ``forward``: of a tile, and of the last
    one. The second columns begin OFFSET behind the start of a tile, and come from two tiles; their part from the first
    has matrices 2 and 3, that from the second has 4 and 5.
    """
    if FORWARD and RAGGED:
        last = (terms - 1) // K
        matrix = matrix_of(forward, (last == start // K).to(tl.int32), K, True)
        first = transformed(matrix, tile(x, token, start, tokens, terms, x0, K), INTERPRETED)
        number = (start + apart) // K
        matrix = matrix_of(forward, (2 if OFFSET else 0) + (last == number).to(tl.int32), K, True)
        second = transformed(matrix, tile(x, token, number * K, tokens, terms, x0, K), INTERPRETED)
        if OFFSET:
            matrix = matrix_of(forward, 4 + (last == number + 1).to(tl.int32), K, True)
            second += transformed(matrix, tile(x, token, (number + 1) * K, tokens, terms, x0, K), INTERPRETED)
    else:  # both at once
        lane = tl.arange(0, 2 * token.shape[0])
        column = start + lane // token.shape[0] * apart
        values = tile(x, lane % token.shape[0], column, tokens, terms, x0, K)
        if FORWARD:
            values = transformed(matrix, values, INTERPRETED)
        values = values.to(tl.float32).reshape(K, 2, token.shape[0])
        first, second = tl.split(tl.permute(values, (0, 2, 1)))
    return first, second
