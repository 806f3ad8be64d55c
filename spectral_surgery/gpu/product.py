# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""Y = X Mᵀ of many tokens from levels in planes of bytes, nibbles and bits, which become bfloat16 in registers.

Matrix units multiply bfloat16, which holds any int8 level. Activations become as many bfloat16 numbers as their type
has digits for: one for bfloat16, two for float16 (error 2^-16), three for float32 (2^-24). Levels are on the side of
the matrix unit that takes its operand from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_surgery.gpu.levels import half_levels, load_planes, times
from spectral_surgery.gpu.parts import as_bfloat16, outliers, split_dot, store, tile


@triton.jit
def product(x, codes, lowest, scale, row_scale, places, beyond, starts, y, tokens, rows, terms, width, x0, c0, c1, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, DIGITS: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, PER_COLUMN: tl.constexpr, PER_ROW: tl.constexpr, OUTLIERS: tl.constexpr, BACKEND: tl.constexpr):  # fmt: skip  # noqa: E501
    """A block of R rows and T tokens; `spectral_surgery.matmul.on_gpu` knows what fits together.

    Args:
        x: [tokens, terms] with rows x0 apart, in the domain of the levels.
        codes: [rows, bytes of a row] int8, the first plane of `matmul.planes.LAYOUTS`; with strides (c0, c1) if alone.
        lowest: [rows, bytes of a row], the second plane.
        scale: [1] or [terms] float32.
        row_scale: [rows] float32.
        places: [n], row * terms + column of outliers, ascending.
        beyond: [n] what they go beyond their levels by.
        starts: [blocks + 1], the first outlier of each block of rows.
        y: [tokens, rows], contiguous.
        width: columns that are read one after the other: with NIBBLES, columns k and width + k are read together.
    """
    interpreted: tl.constexpr = BACKEND == "interpreter"
    block = tl.program_id(0)
    row, token = block * R + tl.arange(0, R), tl.program_id(1) * T + tl.arange(0, T)
    total = tl.zeros((R, T), tl.float32)
    for first in range(0, width, K):
        column = first + tl.arange(0, K)
        values = _scaled(x, scale, token, first, tokens, terms, x0, K, PER_COLUMN)
        if NIBBLES:
            one, two, nibbles = load_planes(codes, lowest, row, column, rows, width, width, terms, BYTES, NIBBLES, BITS)
            low = half_levels(nibbles, one, False, BITS, PARTS, SHIFT, BACKEND)
            total = split_dot(as_bfloat16(low, interpreted), values, total, DIGITS, interpreted)
            later = _scaled(x, scale, token, first + width, tokens, terms, x0, K, PER_COLUMN)
            high = half_levels(nibbles, two, True, BITS, PARTS, SHIFT, BACKEND)
            total = split_dot(as_bfloat16(high, interpreted), later, total, DIGITS, interpreted)
            if BYTES:
                total = split_dot(as_bfloat16(one.to(tl.int32) * 256, interpreted), values, total, DIGITS, interpreted)
                total = split_dot(as_bfloat16(two.to(tl.int32) * 256, interpreted), later, total, DIGITS, interpreted)
        else:
            at = row.to(tl.int64)[:, None] * c0 + column.to(tl.int64)[None, :] * c1
            code = tl.load(codes + at, mask=(row < rows)[:, None] & (column < width)[None, :], other=0)
            total = split_dot(as_bfloat16(code, interpreted), values, total, DIGITS, interpreted)
    total *= 1 / times(NIBBLES, BITS, PARTS, SHIFT)
    if OUTLIERS:
        total = outliers(x, places, beyond, starts, x, scale, block, 0, tl.program_id(1) * T, total, tokens, terms, x0, K, 1, False, PER_COLUMN, interpreted)  # fmt: skip  # noqa: E501
    if not PER_COLUMN:
        total *= tl.load(scale)
    if PER_ROW:
        total *= tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None]
    to = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    store(to, total, (row < rows)[:, None] & (token < tokens)[None, :], interpreted)


@triton.jit
def _scaled(x, scale, token, first, tokens, terms, x0, K: tl.constexpr, PER_COLUMN: tl.constexpr):
    """Activations of K terms, [K, T] float32, times the scales of their columns."""
    values = tile(x, token, first, tokens, terms, x0, K).to(tl.float32)
    if PER_COLUMN:
        column = first + tl.arange(0, K)
        values *= tl.load(scale + column, mask=column < terms, other=0.0)[:, None]
    return values
