# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0917
"""Y += X Dᵀ diag(w) U of a few tokens, without D and U where they are waves.

D is [J, I] and U is [J, O]. Waves are cosines of whole frequencies, 0 to n/2 of n points, and after all of these their
sines. Their angles are reduced as integers, so that a wave is exact to float32 at any point of 2^16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_surgery.gpu.parts import INTERPRETED, split_dot, store

TOKENS, RANKS, POINTS = 16, 16, 32  # of a program of `components`
INTO, OUT = 64, 16  # ranks at a time, and points, of one of `expand`
SUMS = 32  # coefficients of a program of `coefficient_sums`
WARPS, STAGES, OUT_STAGES = 4, 1, 2  # of 10.0, registers of `components` are spilled with 2 stages

_INTERPRETED = tl.constexpr(INTERPRETED)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a number added to it is rounded to an integer, which is in its low bits
_ROUND_BITS = tl.constexpr(0x4B400000)  # the bits of that number
_PRECISION = tl.constexpr("ieee" if INTERPRETED else "bf16x6")  # a product of float32 numbers in matrix units


@triton.jit
def components(x, factors, out, tokens, length, x0, ranks, SPLITS: tl.constexpr, T: tl.constexpr, J: tl.constexpr, N: tl.constexpr, WAVES: tl.constexpr):  # fmt: skip  # noqa: E501
    """Z = X Dᵀ: programs are a block of ranks, a share of the points and a block of tokens.

    Args:
        x: [tokens, length] with rows x0 apart.
        factors: [ranks, length] float32; with WAVES, [ranks / 2] int64 frequencies.
        out: [SPLITS, tokens, ranks] float32, whose sum is Z.
    """
    _share(x, factors, out, tl.program_id(1), tokens, length, x0, ranks, SPLITS, T, J, N, WAVES)


@triton.jit
def both_components(x, x_factors, x_out, x_length, x0, y, y_factors, y_out, y_length, y0, tokens, ranks, SPLITS: tl.constexpr, T: tl.constexpr, J: tl.constexpr, N: tl.constexpr):  # fmt: skip  # noqa: E501
    """`components` of two tensors and their waves, in one launch."""
    split = tl.program_id(1)
    if split < SPLITS:
        _share(x, x_factors, x_out, split, tokens, x_length, x0, ranks, SPLITS, T, J, N, True)
    else:
        split -= SPLITS
        _share(y, y_factors, y_out, split, tokens, y_length, y0, ranks, SPLITS, T, J, N, True)


@triton.jit
def _share(x, factors, out, split, tokens, length, x0, ranks, SPLITS: tl.constexpr, T: tl.constexpr, J: tl.constexpr, N: tl.constexpr, WAVES: tl.constexpr):  # fmt: skip  # noqa: E501
    rank = tl.program_id(0) * J + tl.arange(0, J)
    token = tl.program_id(2).to(tl.int64) * T + tl.arange(0, T)
    live_rank, live_token = rank < ranks, token < tokens
    total = tl.zeros((T, J), tl.float32)
    each = tl.cdiv(tl.cdiv(length, N), SPLITS)
    if WAVES:
        frequency, quarter = _frequencies(factors, rank, ranks)
    for number in range(split * each, tl.minimum((split + 1) * each, tl.cdiv(length, N))):
        point = number * N + tl.arange(0, N)
        live = point < length
        values = tl.load(x + token[:, None] * x0 + point[None, :], mask=live_token[:, None] & live[None, :], other=0.0)
        if WAVES:
            factor = _wave(point[:, None], frequency[None, :], quarter[None, :], length)
        else:
            at = factors + rank.to(tl.int64)[None, :] * length + point[:, None]
            factor = tl.load(at, mask=live[:, None] & live_rank[None, :], other=0.0)
        if x.dtype.element_ty == tl.bfloat16:
            total = split_dot(values, factor, total, 3, _INTERPRETED)
        else:
            total = tl.dot(values.to(tl.float32), factor, total, input_precision=_PRECISION)
    to = out + (split * tokens + token)[:, None] * ranks + rank[None, :]
    tl.store(to, total, mask=live_token[:, None] & live_rank[None, :])


@triton.jit
def expand(y, parts, factors, coefficients, order, signs, scale, tokens, length, ranks, SPLITS: tl.constexpr, T: tl.constexpr, J: tl.constexpr, N: tl.constexpr, WAVES: tl.constexpr, ADD: tl.constexpr):  # fmt: skip  # noqa: E501
    """Y = Z diag(w) U, or as much more: programs are a block of points and a block of tokens.

    Args:
        y: [tokens, length], contiguous.
        parts: [SPLITS, tokens, ranks] float32, what `components` left.
        factors: as there, of `length`.
        coefficients: with WAVES, [ranks / 2]; w is scale times these, and times signs where waves are sines.
        order: [ranks / 2] int64, the coefficient of each wave.
        signs: [ranks / 2, 2] float32, of which the second one has the sign.
    """
    point = tl.program_id(0) * N + tl.arange(0, N)
    token = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    live, live_token = point < length, token < tokens
    total = tl.zeros((T, N), tl.float32)
    for first in range(0, ranks, J):
        rank = first + tl.arange(0, J)
        live_rank = rank < ranks
        values = tl.zeros((T, J), tl.float32)
        for split in range(SPLITS):
            at = parts + (split * tokens + token)[:, None] * ranks + rank[None, :]
            values += tl.load(at, mask=live_token[:, None] & live_rank[None, :], other=0.0)
        if WAVES:
            frequency, quarter = _frequencies(factors, rank, ranks)
            values *= _weights(coefficients, order, signs, rank, quarter, ranks)[None, :]
            factor = _wave(point[None, :], frequency[:, None], quarter[:, None], length)
        else:
            at = factors + rank.to(tl.int64)[:, None] * length + point[None, :]
            factor = tl.load(at, mask=live_rank[:, None] & live[None, :], other=0.0)
        total = tl.dot(values, factor, total, input_precision=_PRECISION)
    to = y + token[:, None] * length + point[None, :]
    total *= scale
    if ADD:
        total += tl.load(to, mask=live_token[:, None] & live[None, :], other=0.0).to(tl.float32)
    store(to, total, live_token[:, None] & live[None, :], _INTERPRETED)


@triton.jit
def coefficient_sums(x_parts, y_parts, order, signs, out, scale, tokens, ranks, SPLITS: tl.constexpr, K: tl.constexpr):
    """The gradient of the coefficients, from the components of x and of the gradient of y.

    Args:
        x_parts: [SPLITS, tokens, ranks] float32, what `both_components` left.
        y_parts: the same of the other.
        order: as for `expand`, and signs too.
        out: [ranks / 2], at the places that order says.
    """
    count = ranks // 2
    number = tl.program_id(0) * K + tl.arange(0, K)
    live = number < count
    cosines, sines = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    for token in range(tokens):
        cosines += _sum(x_parts, token, number, tokens, ranks, live, SPLITS) * _sum(y_parts, token, number, tokens, ranks, live, SPLITS)  # fmt: skip  # noqa: E501
        sines += _sum(x_parts, token, count + number, tokens, ranks, live, SPLITS) * _sum(y_parts, token, count + number, tokens, ranks, live, SPLITS)  # fmt: skip  # noqa: E501
    sign = tl.load(signs + 2 * number + 1, mask=live, other=0.0)
    result = (cosines + tl.where(sign < 0, -sines, sines)) * scale
    store(out + tl.load(order + number, mask=live, other=0), result, live, _INTERPRETED)


@triton.jit
def _sum(parts, token, rank, tokens, ranks, live, SPLITS: tl.constexpr):
    total = tl.zeros(rank.shape, tl.float32)
    for split in range(SPLITS):
        at = parts + (tl.cast(split, tl.int64) * tokens + token) * ranks + rank
        total += tl.load(at, mask=live, other=0.0)
    return total


@triton.jit
def _frequencies(factors, rank, ranks):
    """Of waves, and 1 where they are sines."""
    quarter = (rank >= ranks // 2).to(tl.int32)
    frequency = tl.load(factors + rank - quarter * (ranks // 2), mask=rank < ranks, other=0)
    return frequency.to(tl.int32), quarter


@triton.jit
def _weights(coefficients, order, signs, rank, quarter, ranks):
    number = rank - quarter * (ranks // 2)
    live = rank < ranks
    weight = tl.load(coefficients + tl.load(order + number, mask=live, other=0), mask=live, other=0.0).to(tl.float32)
    sign = tl.load(signs + 2 * number + 1, mask=live, other=0.0)
    return tl.where((quarter > 0) & (sign < 0), -weight, weight)


@triton.jit
def _wave(point, frequency, quarter, length):
    """cos(2π (frequency * point / length - quarter / 4)), in float32.

    The nearest whole number of turns is found in floating point, and taken off in integers, whose overflow does not
    matter to what is left: at most half a turn, in quarters of 1 / length.
    """
    fraction = frequency.to(tl.float32) / length
    turns = point.to(tl.float32) * fraction - quarter.to(tl.float32) * 0.25
    whole = (turns + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
    left = frequency * 4 * point - quarter * length - whole * (4 * length)
    at = 0.25 - tl.abs(left.to(tl.float32) * (0.25 / length))
    # sin(2π at) by the polynomial of least error up to 0.28
    square = at * at
    value = square * -14.150019645690918 + 41.967071533203125
    value = value * square - 76.70157623291016
    value = value * square + 81.60514831542969
    value = value * square - 41.34170150756836
    return (value * square + 6.2831854820251465) * at
