# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""Y = X Mᵀ of many tokens from levels of one byte or half a byte, which become bfloat16 in registers.

Matrix units multiply bfloat16, which holds any int8 level. Activations become as many bfloat16 numbers as their type
has digits for: one for bfloat16, two for float16 (error 2^-16), three for float32 (2^-24). Levels are on the side of
the matrix unit that takes its operand from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_surgery.gpu.parts import as_bfloat16, outliers, split_dot, store, tile


@triton.jit
def product(x, codes, scale, row_scale, places, beyond, starts, y, tokens, rows, terms, width, x0, c0, c1, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, DIGITS: tl.constexpr, NIBBLES: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, PER_COLUMN: tl.constexpr, PER_ROW: tl.constexpr, OUTLIERS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip  # noqa: E501
    """A block of R rows and T tokens; `spectral_surgery.matmul.on_gpu` knows what fits together.

    Args:
        x: [tokens, terms] with rows x0 apart, in the domain of the levels.
        codes: [rows, width] int8 with strides (c0, c1); with NIBBLES, columns k and width + k are in byte k.
        scale: [1] or [terms] float32.
        row_scale: [rows] float32.
        places: [n], row * terms + column of outliers, ascending.
        beyond: [n] what they go beyond their levels by.
        starts: [blocks + 1], the first outlier of each block of rows.
        y: [tokens, rows], contiguous.
    """
    block = tl.program_id(0)
    row, token = block * R + tl.arange(0, R), tl.program_id(1) * T + tl.arange(0, T)
    total = tl.zeros((R, T), tl.float32)
    code_row = codes + row.to(tl.int64)[:, None] * c0
    for first in range(0, width, K):
        column = first + tl.arange(0, K)
        live = (row < rows)[:, None] & (column < width)[None, :]
        code = tl.load(code_row + column.to(tl.int64)[None, :] * c1, mask=live, other=0)
        values = tile(x, token, first, tokens, terms, x0, K).to(tl.float32)
        if PER_COLUMN:
            values *= tl.load(scale + column, mask=column < terms, other=0.0)[:, None]
        if NIBBLES:
            total = split_dot(_level((code << 4) >> 4, PARTS, SHIFT, INTERPRETED), values, total, DIGITS, INTERPRETED)
            code, column = code >> 4, column + width
            values = tile(x, token, first + width, tokens, terms, x0, K).to(tl.float32)
            if PER_COLUMN:
                values *= tl.load(scale + column, mask=column < terms, other=0.0)[:, None]
        total = split_dot(_level(code, PARTS, SHIFT, INTERPRETED), values, total, DIGITS, INTERPRETED)
    if OUTLIERS:
        total = outliers(x, places, beyond, starts, x, scale, block, 0, tl.program_id(1) * T, total, tokens, terms, x0, K, 1, False, PER_COLUMN, INTERPRETED)  # fmt: skip  # noqa: E501
    if not PER_COLUMN:
        total *= tl.load(scale)
    if PER_ROW:
        total *= tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None]
    to = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    store(to, total, (row < rows)[:, None] & (token < tokens)[None, :], INTERPRETED)


@triton.jit
def _level(code, PARTS: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Codes to levels on their grid, bfloat16."""
    if PARTS != 1 or SHIFT != 0:
        code = code.to(tl.int32)
        code = code * PARTS + tl.where(code > 0, SHIFT, tl.where(code < 0, -SHIFT, 0))
    return as_bfloat16(code, INTERPRETED)
