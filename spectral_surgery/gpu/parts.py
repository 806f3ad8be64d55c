# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""What kernels of products share: tiles of activations, small matrices and outliers."""

from __future__ import annotations

import triton
import triton.language as tl

AT_A_TIME = tl.constexpr(32)  # outliers
INTERPRETED = bool(triton.knobs.runtime.interpret)  # without a GPU, slowly: for tests


@triton.jit
def store(to, values, live, INTERPRETED: tl.constexpr):
    """Store float32 values as what is there."""
    if to.dtype.element_ty == tl.bfloat16:
        values = as_bfloat16(values, INTERPRETED)
    tl.store(to, values.to(to.dtype.element_ty), mask=live)


@triton.jit
def outliers(x, places, beyond, starts, forward, scale, block, split, first_token, total, tokens, terms, x0, K: tl.constexpr, SPLITS: tl.constexpr, FORWARD: tl.constexpr, PER_COLUMN: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Total, [R, T], with what the share of a split of the outliers of a block of rows adds to it."""
    stop = tl.load(starts + block + 1)
    for at in range(tl.load(starts + block) + split * AT_A_TIME, stop, SPLITS * AT_A_TIME):
        first_row = block * total.shape[0]
        total = _some_outliers(x, places, beyond, forward, scale, at, stop, first_row, first_token, total, tokens, terms, x0, K, FORWARD, PER_COLUMN, INTERPRETED)  # fmt: skip  # noqa: E501
    return total


@triton.jit
def _some_outliers(x, places, beyond, forward, scale, at, stop, first_row, first_token, total, tokens, terms, x0, K: tl.constexpr, FORWARD: tl.constexpr, PER_COLUMN: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip  # noqa: E501
    """Total, [R, T], with what some outliers add to it."""
    number = at + tl.arange(0, AT_A_TIME)
    live = number < stop
    place = tl.load(places + number, mask=live, other=0).to(tl.int64)
    value = tl.load(beyond + number, mask=live, other=0).to(tl.float32)
    row, column = (place // terms - first_row).to(tl.int32), (place % terms).to(tl.int32)
    if PER_COLUMN:
        value *= tl.load(scale + column)
    added = tl.zeros((AT_A_TIME, total.shape[1]), tl.float32)
    tokens_here = first_token + tl.arange(0, total.shape[1])
    if FORWARD:
        last = ((terms - 1) // K == column // K).to(tl.int32)
        term = tl.arange(0, K)[None, :]
        factor = tl.load(forward + (last * K * K + column % K * K)[:, None] + term).to(tl.float32)
        term = term + (column // K * K)[:, None]
        for token in range(first_token, tl.minimum(first_token + total.shape[1], tokens)):
            values = tl.load(x + tl.cast(token, tl.int64) * x0 + term, mask=term < terms, other=0.0).to(tl.float32)
            added = tl.where((tokens_here == token)[None, :], (tl.sum(factor * values, 1) * value)[:, None], added)
    else:
        at_x = x + tokens_here.to(tl.int64)[None, :] * x0 + column[:, None]
        added = tl.load(at_x, mask=(tokens_here < tokens)[None, :], other=0.0).to(tl.float32) * value[:, None]
    at_row = (tl.arange(0, total.shape[0])[:, None] == row[None, :]) & live[None, :]
    return split_dot(as_bfloat16(at_row, INTERPRETED), added, total, 3, INTERPRETED)


@triton.jit
def tile(x, token, first, tokens, terms, x0, K: tl.constexpr):
    """Activations of K terms from the first, which may be another for each token: [K, T]."""
    term = (token * 0 + first)[None, :] + tl.arange(0, K)[:, None]
    live = (term < terms) & (token < tokens)[None, :]
    return tl.load(x + token.to(tl.int64)[None, :] * x0 + term, mask=live, other=0.0)


@triton.jit
def matrix_of(matrices, number, SIDE: tl.constexpr, WANTED: tl.constexpr):
    """One of several matrices, [SIDE, SIDE]; nothing where none is wanted."""
    matrix = 0
    if WANTED:
        at = tl.arange(0, SIDE)
        matrix = tl.load(matrices + number * SIDE * SIDE + at[:, None] * SIDE + at[None, :])
    return matrix


@triton.jit
def transformed(matrix, values, INTERPRETED: tl.constexpr):
    """The matrix times values, which are rounded to bfloat16 where it is."""
    zero = tl.zeros((matrix.shape[0], values.shape[1]), tl.float32)
    if matrix.dtype == tl.bfloat16:
        product = dot(matrix, as_bfloat16(values, INTERPRETED), zero, INTERPRETED)
    else:
        precision: tl.constexpr = "ieee" if INTERPRETED else "bf16x6"
        product = tl.dot(matrix, values.to(tl.float32), zero, input_precision=precision)
    return product


@triton.jit
def split_dot(levels, values, total, DIGITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Levels times values + total, with the values as sums of bfloat16 numbers."""
    for _ in tl.static_range(DIGITS):
        part = as_bfloat16(values, INTERPRETED)
        total = dot(levels, part, total, INTERPRETED)
        values -= part.to(tl.float32)
    return total


@triton.jit
def dot(a, b, total, INTERPRETED: tl.constexpr):
    """A b + total of bfloat16, with float32 sums; Triton's interpreter has no products of bfloat16."""
    if INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def as_bfloat16(values, INTERPRETED: tl.constexpr):
    """The nearest bfloat16; Triton's interpreter cuts bits off, and takes the bits of integers as they are."""
    if INTERPRETED:
        values = values.to(tl.float32)
        bits = values.to(tl.int32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(tl.bfloat16)
