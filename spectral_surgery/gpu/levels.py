# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""Levels as they lie in memory, in planes of bytes, nibbles and bits, and sums of their products with int8 digits.

A kernel goes along the terms by two tiles of columns at a time, ``apart`` columns from each other. With NIBBLES these
are of the two halves of the columns, and a byte has a nibble of each; see `matmul.planes`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOW = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }")  # four bytes at once
_HIGH = tl.constexpr("and.b32 $0, $1, 0xF0F0F0F0;")
# a bit is what a mask leaves of the byte of its eight; 127 added to it reach the highest bit, which becomes an 8
_BIT = tl.constexpr("{ .reg .b32 t; and.b32 t, $2, $3; add.u32 t, t, 0x7F7F7F7F; shr.u32 t, t, 4; lop3.b32 $0, t, 0x08080808, $1, 0xEA; }")  # fmt: skip  # noqa: E501


@triton.jit
def load_planes(codes, lowest, row, column, rows, width, apart, terms, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BITS: tl.constexpr):  # fmt: skip  # noqa: E501
    """What is stored of some rows and two tiles of columns: of the first, and ``apart`` from it.

    Returns bytes, [R, K], or bits, [R, K / 8], of each; nibbles of both, [R, K]; nothing for what is not there.
    """
    first, second, nibbles = 0, 0, 0
    live_row, place = (row < rows)[:, None], row.to(tl.int64)[:, None]
    if NIBBLES:
        plane = lowest if BYTES else codes
        nibbles = tl.load(plane + place * width + column[None, :], mask=live_row & (column < width)[None, :], other=0)
    if BYTES:
        end = apart if NIBBLES else terms
        at = codes + place * terms + column[None, :]
        first = tl.load(at, mask=live_row & (column < end)[None, :], other=0)
        second = tl.load(at + apart, mask=live_row & (column + apart < terms)[None, :], other=0)
    if BITS:  # halves are whole bytes
        byte = tl.min(column, 0) // 8 + tl.arange(0, column.shape[0] // 8)
        at = lowest + place * (terms // 8) + byte[None, :]
        live = live_row & (byte < width // 8)[None, :]
        first = tl.load(at, mask=live, other=0)
        second = tl.load(at + width // 8, mask=live, other=0)
    return first, second, nibbles


@triton.jit
def level_sums(first, second, nibbles, digit, second_digit, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, BACKEND: tl.constexpr):  # fmt: skip  # noqa: E501
    """Levels, `times` as large, times the digits of both tiles, [K, lanes] int8: [R, lanes] int32."""
    if BYTES:
        total = tl.dot(first, digit, out_dtype=tl.int32)
        total = tl.dot(second, second_digit, total, out_dtype=tl.int32)
        if NIBBLES:
            total *= 256
            total = tl.dot(half_levels(nibbles, 0, False, False, 1, 0, BACKEND), digit, total, out_dtype=tl.int32)
            total = tl.dot(half_levels(nibbles, 0, True, False, 1, 0, BACKEND), second_digit, total, out_dtype=tl.int32)
    else:
        low = half_levels(nibbles, first, False, BITS, PARTS, SHIFT, BACKEND)
        total = tl.dot(low, digit, out_dtype=tl.int32)
        high = half_levels(nibbles, second, True, BITS, PARTS, SHIFT, BACKEND)
        total = tl.dot(high, second_digit, total, out_dtype=tl.int32)
    return total


@triton.jit
def times(NIBBLES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr):
    """How many times as large as levels what is multiplied is: nibbles and bits stay where they end in a byte."""
    result: tl.constexpr = 1 if not NIBBLES or PARTS != 1 or SHIFT != 0 else 8 if BITS else 16
    return result


@triton.jit
def half_levels(nibbles, packed, HIGH: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, BACKEND: tl.constexpr):  # fmt: skip  # noqa: E501
    """Levels of one half of the columns, `times` as large: [R, K] int8."""
    if BACKEND == "cuda":
        text: tl.constexpr = _HIGH if HIGH else _LOW
        levels = tl.inline_asm_elementwise(text, "=r,r", [nibbles], dtype=tl.int8, is_pure=True, pack=4)
    else:
        levels = nibbles & -16 if HIGH else nibbles << 4
    if BITS:
        levels = _with_bits(levels, packed, BACKEND)
    if PARTS != 1 or SHIFT != 0:  # the points of `matmul.levels.Grid`
        number = levels.to(tl.int32) >> (3 if BITS else 4)
        levels = (number * PARTS + tl.where(number > 0, SHIFT, tl.where(number < 0, -SHIFT, 0))).to(tl.int8)
    return levels


@triton.jit
def _with_bits(nibbles, packed, BACKEND: tl.constexpr):
    """Nibbles with a bit below each."""
    bit = tl.broadcast_to(tl.arange(0, 8)[None, None, :], (packed.shape[0], packed.shape[1], 8))
    byte = tl.broadcast_to(packed[:, :, None], (packed.shape[0], packed.shape[1], 8))
    if BACKEND == "cuda":
        byte, mask = (
            byte.to(tl.int8, bitcast=True).reshape(nibbles.shape),
            (1 << bit).to(tl.int8).reshape(nibbles.shape),
        )
        levels = tl.inline_asm_elementwise(_BIT, "=r,r,r,r", [nibbles, byte, mask], dtype=tl.int8, is_pure=True, pack=4)
    else:
        levels = nibbles + (((byte.to(tl.int32) >> bit) & 1) << 3).to(tl.int8).reshape(nibbles.shape)
    return levels
