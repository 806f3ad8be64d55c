# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201, N803, PLR0917
"""`few_tokens` for the matrices of many experts in one launch, each with tokens of its own."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_surgery.gpu.few_tokens import few_tokens

FIELDS = tl.constexpr(9)  # of a job


@triton.jit
def experts(x, jobs, forward, inverse, partial, counters, y, rows, terms, width, x0, T: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, K: tl.constexpr, SIDE: tl.constexpr, SPLITS: tl.constexpr, DIGITS: tl.constexpr, BYTES: tl.constexpr, NIBBLES: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr, FORWARD: tl.constexpr, INVERSE: tl.constexpr, OFFSET: tl.constexpr, RAGGED: tl.constexpr, PER_COLUMN: tl.constexpr, PER_ROW: tl.constexpr, BIAS: tl.constexpr, OUTLIERS: tl.constexpr, BACKEND: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip  # noqa: E501
    """Rows and terms of one expert; the third index of a program is that of the job.

    Args:
        x: [S, terms] with rows x0 apart, the tokens of one expert one after the other.
        jobs: [jobs, FIELDS] int64: addresses of codes, lowest, scale, row_scale, places, beyond and starts of an
            expert, its first token, and how many it has: at most T.
        forward: as for `few_tokens`.
        inverse: as there.
        partial: [jobs, groups, SPLITS, T, BLOCKS * R] float32.
        counters: [jobs, groups] int32, zeros, and zeros again afterwards.
        y: [S, rows], contiguous.
        WIDE: whether places are int64.
    """
    number = tl.program_id(2).to(tl.int64)
    job = jobs + number * FIELDS
    groups = tl.num_programs(0)
    codes = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.int8)), 16)
    lowest = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(tl.uint8 if BITS else tl.int8)), 16)
    scale = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(tl.float32)), 16)
    row_scale = tl.multiple_of(tl.load(job + 3).to(tl.pointer_type(tl.float32)), 16)
    places = tl.load(job + 4).to(tl.pointer_type(tl.int64 if WIDE else tl.int32))
    beyond = tl.load(job + 5).to(tl.pointer_type(tl.int8 if NIBBLES and not BYTES else tl.float32))
    starts = tl.load(job + 6).to(tl.pointer_type(tl.int64))
    first, tokens = tl.load(job + 7), tl.load(job + 8).to(tl.int32)
    left = partial + number * groups * (SPLITS * T * BLOCKS * R)
    few_tokens(x + first * x0, codes, lowest, forward, inverse, scale, row_scale, scale, places, beyond, starts, left, counters + number * groups, y + first * rows, tokens, rows, terms, width, x0, T, R, BLOCKS, K, SIDE, SPLITS, DIGITS, BYTES, NIBBLES, BITS, PARTS, SHIFT, FORWARD, INVERSE, OFFSET, RAGGED, PER_COLUMN, PER_ROW, BIAS, OUTLIERS, BACKEND)  # fmt: skip  # noqa: E501
