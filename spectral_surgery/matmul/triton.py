"""Products with int8 or packed 4-bit levels on a GPU, in Triton: levels become numbers in registers, never in memory.

Every program makes a block of the product; where there are too few blocks for a large GPU, several programs share the
terms of one. The transforms of the activations stay outside:
they are small, and a torch product each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_FEW = 16  # tokens, the least that the matrix units take


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@dataclass(frozen=True)
class Blocks:
    """What one program works on.

    Attributes:
        tokens: T.
        rows: of the matrix.
        terms: summed at a time.
        splits: programs that share the terms of an output.
    """

    tokens: int
    rows: int
    terms: int
    splits: int


def blocks(tokens: int, rows: int, terms: int) -> Blocks:
    """How to cut a product of these numbers of tokens, rows and terms."""
    few = tokens <= _FEW
    height, width = (32, 128) if few else (128, 64)
    high = _FEW if few else 64
    programs = max(1, -(-tokens // high) * -(-rows // height))
    splits = max(1, min(_PROGRAMS // programs, -(-terms // (4 * width))))
    return Blocks(high, height, width, splits)


def product(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """X Mᵀ with float32 sums: [T, r].

    Args:
        x: [T, K] float32, bfloat16 or float16; float32 products are not rounded to fewer bits.
        matrix: [r, K] int8, with any strides.
    """
    tokens, terms = x.shape
    rows, cut = len(matrix), blocks(len(x), len(matrix), terms)
    out = x.new_empty((cut.splits, tokens, rows), dtype=torch.float32)
    if out.numel():
        arguments = (x, matrix, out, tokens, rows, terms, *x.stride(), *matrix.stride())
        with _on(x):
            _kernel("int8")[_grid(cut, tokens, rows)](*arguments, *_constants(x, cut))
    return _summed(out, dtype)


def packed_product(x: Tensor, packed: Tensor, grid: Tensor) -> Tensor:
    """X Mᵀ with float32 sums, M as nibbles: [T, r] in the dtype of x.

    ``x`` is [T, K] float32, bfloat16 or float16; ``packed`` is [r, ceil(K / 2)] int8, see `LevelForm`; ``grid`` is [2]
    int8, parts and shift of the levels.
    """
    tokens, terms = x.shape
    rows, half = packed.shape
    cut = blocks(tokens, rows, half)
    out = x.new_empty((cut.splits, tokens, rows), dtype=torch.float32)
    if out.numel():
        arguments = (x, packed, grid, out, tokens, rows, terms, half, *x.stride(), *packed.stride())
        with _on(x):
            _kernel("int4")[_grid(cut, tokens, rows)](*arguments, *_constants(x, cut))
    return _summed(out, x.dtype)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _grid(cut: Blocks, tokens: int, rows: int) -> tuple[int, int, int]:
    return (-(-rows // cut.rows), -(-tokens // cut.tokens), cut.splits)


def _constants(x: Tensor, cut: Blocks) -> tuple[int, int, int, int, str]:
    return (cut.tokens, cut.rows, cut.terms, cut.splits, "ieee" if x.dtype == torch.float32 else "tf32")


def _summed(out: Tensor, dtype: torch.dtype) -> Tensor:
    return (out[0] if len(out) == 1 else out.sum(0)).to(dtype)


@lru_cache(maxsize=2)
def _kernel(kind: str) -> Any:
    triton, tl = import_module("triton"), import_module("triton.language")

    def int8(x, matrix, out, tokens, rows, terms, x0, x1, m0, m1, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]  # noqa: ANN001, ANN202, N803, PLR0917, E501  # fmt: skip
        row = tl.program_id(0) * R + tl.arange(0, R)
        token = tl.program_id(1) * T + tl.arange(0, T)
        split = tl.program_id(2)
        live_row, live_token = row < rows, token < tokens
        x_row, m_row = x + token.to(tl.int64)[:, None] * x0, matrix + row.to(tl.int64)[None, :] * m0
        total = tl.zeros((T, R), tl.float32)
        for start in range(split * K, terms, SPLITS * K):
            term = start + tl.arange(0, K)
            live = term < terms
            values = tl.load(x_row + term[None, :] * x1, mask=live_token[:, None] & live[None, :], other=0.0)
            level = tl.load(m_row + term[:, None] * m1, mask=live[:, None] & live_row[None, :], other=0)
            total = tl.dot(values, level.to(values.dtype), total, input_precision=PRECISION)
        to = out + (split * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(to, total, mask=live_token[:, None] & live_row[None, :])

    def int4(x, packed, grid, out, tokens, rows, terms, half, x0, x1, m0, m1, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def, name-defined]  # noqa: ANN001, ANN202, N803, PLR0917, E501  # fmt: skip
        row = tl.program_id(0) * R + tl.arange(0, R)
        token = tl.program_id(1) * T + tl.arange(0, T)
        split = tl.program_id(2)
        live_row, live_token = row < rows, token < tokens
        parts, shift = tl.load(grid).to(tl.int32), tl.load(grid + 1).to(tl.int32)
        x_row, m_row = x + token.to(tl.int64)[:, None] * x0, packed + row.to(tl.int64)[None, :] * m0
        total = tl.zeros((T, R), tl.float32)
        for start in range(split * K, half, SPLITS * K):
            term = start + tl.arange(0, K)
            live, live_high = term < half, term + half < terms
            both = tl.load(m_row + term[:, None] * m1, mask=live[:, None] & live_row[None, :], other=0).to(tl.int32)
            low, high = (both << 28) >> 28, both >> 4  # keep the sign
            low = low * parts + tl.where(low > 0, shift, tl.where(low < 0, -shift, 0))
            high = high * parts + tl.where(high > 0, shift, tl.where(high < 0, -shift, 0))
            first = tl.load(x_row + term[None, :] * x1, mask=live_token[:, None] & live[None, :], other=0.0)
            second = tl.load(
                x_row + (term[None, :] + half) * x1, mask=live_token[:, None] & live_high[None, :], other=0.0
            )
            total = tl.dot(first, low.to(first.dtype), total, input_precision=PRECISION)
            total = tl.dot(second, high.to(second.dtype), total, input_precision=PRECISION)
        to = out + (split * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(to, total, mask=live_token[:, None] & live_row[None, :])

    made = {"int8": int8, "int4": int4}[kind]
    made.__globals__["tl"] = tl  # where Triton's interpreter looks for its language
    return triton.jit(made)
