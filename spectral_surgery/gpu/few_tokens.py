# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""Y = X Wᵀ of a few tokens from levels of one byte or half a byte, with the transforms of both sides, in one launch.

A program makes R rows of the product and goes along the terms, K at a time. K activations are transformed by a small
matrix and become digits of eight bits, in units of their largest: two digits, or three for float32, hold them to 2^-16
or 2^-24 of it. Digits and levels meet in the int8 matrix unit as they are: to make floating-point numbers of the levels
would take longer than to read them. Sums of K terms are at most 127 * 127 * 128 < 2^24, so that they stay exact.

Where rows alone do not fill the chip, several programs share the terms of the same rows, and the last of them to finish
adds up what the others left, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_surgery.gpu.parts import matrix_of, outliers, store, tile, transformed


@triton.jit
def few_tokens(x, codes, forward, inverse, scale, row_scale, bias, places, beyond, starts, partial, counters, y, tokens, rows, terms, width, x0, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr, SPLITS: tl.constexpr, DIGITS: tl.constexpr, NIBBLES: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, FORWARD: tl.constexpr, INVERSE: tl.constexpr, OFFSET: tl.constexpr, RAGGED: tl.constexpr, PER_COLUMN: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, OUTLIERS: tl.constexpr, BACKEND: tl.constexpr):  # fmt: skip  # noqa: E501
    """A block of R rows and some of the terms; `spectral_surgery.matmul.on_gpu` knows what fits together.

    Args:
        x: [tokens, terms] with rows x0 apart; at most T tokens.
        codes: [rows, width] int8, contiguous; with NIBBLES, columns k and width + k are in byte k.
        forward: [6, K, K]: what activations are multiplied by; see `_spectrum`.
        inverse: [2, SIDE, SIDE]: the same of rows of the product, and of the last ones.
        scale: [1] or [terms] float32.
        row_scale: [rows] float32.
        bias: [rows].
        places: [n], row * terms + column of outliers, ascending.
        beyond: [n] what they go beyond their levels by.
        starts: [blocks + 1], the first outlier of each block of rows.
        partial: [blocks, SPLITS, R, T] float32, for sums of some of the terms.
        counters: [blocks] int32, zeros, and zeros again afterwards.
        y: [tokens, rows], contiguous.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    interpreted: tl.constexpr = BACKEND == "interpreter"
    planes: tl.constexpr = 2 if NIBBLES else 1
    row, token = block * R + tl.arange(0, R), tl.arange(0, T)
    lane = tl.arange(0, planes * T)  # a token of a plane
    total = tl.zeros((R, planes * T), tl.float32)
    each = tl.cdiv(tl.cdiv(width, K), SPLITS)
    matrix = matrix_of(forward, 0, K, FORWARD and not RAGGED)
    for number in range(split * each, tl.minimum((split + 1) * each, tl.cdiv(width, K))):
        column = number * K + tl.arange(0, K)
        live = (row < rows)[:, None] & (column < width)[None, :]
        code = tl.load(codes + row.to(tl.int64)[:, None] * width + column[None, :], mask=live, other=0)
        values = _spectrum(x, matrix, forward, scale, lane % T, lane // T, number * K, tokens, terms, width, x0, K, NIBBLES, FORWARD, OFFSET, RAGGED, PER_COLUMN, interpreted)  # fmt: skip  # noqa: E501
        unit = tl.max(tl.abs(values), 0) * (1 / 127)
        rest = values * tl.where(unit > 0, 1 / unit, 0.0)[None, :]
        for _ in tl.static_range(DIGITS):
            digit = tl.floor(rest + 0.5)
            total += _sums(code, digit.to(tl.int8), lane < T, NIBBLES, PARTS, SHIFT, BACKEND) * unit[None, :]
            rest, unit = (rest - digit) * 254, unit * (1 / 254)
    if NIBBLES:
        total = tl.sum(total.reshape(R, planes, T), 1)
    if NIBBLES and PARTS == 1 and SHIFT == 0:
        total *= 0.0625  # of the four bits below them
    if OUTLIERS:
        total = outliers(x, places, beyond, starts, forward, scale, block, split, 0, total, tokens, terms, x0, K, SPLITS, FORWARD, PER_COLUMN, interpreted)  # fmt: skip  # noqa: E501
    sums = partial + block.to(tl.int64) * (SPLITS * R * T)
    tl.store(sums + split * (R * T) + tl.arange(0, R)[:, None] * T + token[None, :], total)
    tl.debug_barrier()  # all threads have stored before one of them counts, or others read
    last = True
    if SPLITS > 1:
        last = tl.atomic_add(counters + block, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counters + block, 0)
    if last:
        for number in range(R // SIDE):
            _finish(sums + number * SIDE * T, inverse, scale, row_scale, bias, y, block * R + number * SIDE, token, tokens, rows, R, SPLITS, SIDE, INVERSE, PER_COLUMN, PER_ROW, BIAS, interpreted)  # fmt: skip  # noqa: E501


@triton.jit
def _finish(sums, inverse, scale, row_scale, bias, y, first, token, tokens, rows, R: tl.constexpr, SPLITS: tl.constexpr, SIDE: tl.constexpr, INVERSE: tl.constexpr, PER_COLUMN: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Add up what programs left for SIDE rows, scale it, transform it back and store it."""
    place = tl.arange(0, SIDE)[:, None] * token.shape[0] + token[None, :]
    total = tl.zeros((SIDE, token.shape[0]), tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + split * (R * token.shape[0]) + place, cache_modifier=".cg")
    row = first + tl.arange(0, SIDE)
    live_row = row < rows
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
    store(to, total, live_row[:, None] & (token < tokens)[None, :], INTERPRETED)


@triton.jit
def _sums(code, digit, first_plane, NIBBLES: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, BACKEND: tl.constexpr):  # fmt: skip  # noqa: E501
    """Levels times digits, float32: [R, K] and [K, T] to [R, T], or to [R, 2 T] with the nibbles of a plane each."""
    if NIBBLES:
        low = tl.dot(_nibbles(code, False, PARTS, SHIFT, BACKEND), digit, out_dtype=tl.int32)
        high = tl.dot(_nibbles(code, True, PARTS, SHIFT, BACKEND), digit, out_dtype=tl.int32)
        sums = tl.where(first_plane[None, :], low, high)
    else:
        sums = tl.dot(code, digit, out_dtype=tl.int32)
    return sums.to(tl.float32)


@triton.jit
def _nibbles(code, HIGH: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, BACKEND: tl.constexpr):
    """Levels of one half of the nibbles, int8; sixteen times as large where they are the codes themselves."""
    if PARTS != 1 or SHIFT != 0:
        code = (code >> 4 if HIGH else (code << 4) >> 4).to(tl.int32)
        levels = (code * PARTS + tl.where(code > 0, SHIFT, tl.where(code < 0, -SHIFT, 0))).to(tl.int8)
    elif BACKEND == "cuda":  # four at once
        text: tl.constexpr = (
            "and.b32 $0, $1, 0xF0F0F0F0;" if HIGH else "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }"
        )
        levels = tl.inline_asm_elementwise(text, "=r,r", [code], dtype=tl.int8, is_pure=True, pack=4)
    else:
        levels = code & -16 if HIGH else code << 4
    return levels


@triton.jit
def _spectrum(x, matrix, forward, scale, token, plane, first, tokens, terms, width, x0, K: tl.constexpr, NIBBLES: tl.constexpr, FORWARD: tl.constexpr, OFFSET: tl.constexpr, RAGGED: tl.constexpr, PER_COLUMN: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Scaled coefficients of K columns, from the first of each plane: [K, lanes] float32.

    ``matrix`` transforms a whole tile. Where RAGGED, matrices are loaded from ``forward``: of a tile, and of the last
    one. The second plane begins OFFSET behind the start of a tile, and its columns come from two tiles; their part from
    the first has matrices 2 and 3, that from the second has 4 and 5.
    """
    column = first + plane * width
    if FORWARD and RAGGED:
        last = (terms - 1) // K
        matrix = matrix_of(forward, (first // K == last).to(tl.int32), K, True)
        values = transformed(matrix, tile(x, token, first, tokens, terms, x0, K), INTERPRETED)
        if NIBBLES:
            number = (first + width) // K
            matrix = matrix_of(forward, (2 if OFFSET else 0) + (number == last).to(tl.int32), K, True)
            second = transformed(matrix, tile(x, token, number * K, tokens, terms, x0, K), INTERPRETED)
            if OFFSET:
                matrix = matrix_of(forward, 4 + (number + 1 == last).to(tl.int32), K, True)
                second += transformed(matrix, tile(x, token, (number + 1) * K, tokens, terms, x0, K), INTERPRETED)
            values = tl.where((plane == 0)[None, :], values, second)
    else:
        values = tile(x, token, column, tokens, terms, x0, K)
        if FORWARD:
            values = transformed(matrix, values, INTERPRETED)
        values = values.to(tl.float32)
    if PER_COLUMN:
        column = column[None, :] + tl.arange(0, K)[:, None]
        values *= tl.load(scale + column, mask=column < terms, other=0.0)
    return values
