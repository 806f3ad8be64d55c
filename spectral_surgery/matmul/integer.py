"""Products of floating activations with an int8 matrix, which never becomes a floating matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spectral_surgery.matmul import on_gpu
from spectral_surgery.matmul.dispatch import Way, block_dtype, way

_BLOCK = 1 << 20  # weights converted at a time: they stay in cache
_BLOCKS = 4  # at least: a small matrix is not converted at once either
_DIGIT = 256
_SMALL, _LIFT = 2.0**-60, 2.0**64
_TOKENS = 32  # split into digits at a time: they stay in cache
_NOTHING = torch.empty(0)

Change = Callable[[int, Tensor], Tensor]  # of a block of floating levels, from its first row


@dataclass(frozen=True)
class Operand:
    """Activations ready to be multiplied by the blocks of a matrix.

    Attributes:
        x: [T, K] floating.
        how: see `dispatch.way`.
        dtype: floating type of products with blocks that are not int8.
        digits: [planes, T, K] int8, the lowest first; no plane unless the way is ``planes``.
        unit: [T, 1] float32: x is the number that the digits make up times this.
        lift: [T, 1] float32, what digits of small numbers are of is x times this; [0] for ones.
    """

    x: Tensor
    how: Way
    dtype: torch.dtype
    digits: Tensor
    unit: Tensor
    lift: Tensor

    def terms(self, start: int, stop: int) -> Operand:
        """The same for some of the K terms, as the adjoint of a block of rows needs them."""
        return replace(self, x=self.x[:, start:stop], digits=self.digits[..., start:stop])


def prepare(x: Tensor, accuracy: torch.dtype, *, blocks: bool = False) -> Operand:
    """Choose a way and convert activations once.

    Args:
        x: [T, K] float32, float64 or a 16-bit type.
        blocks: whether levels have to become floating-point numbers.
    """
    how = "blocks" if blocks else way(x.device.type, x.shape[1], accuracy)
    dtype = block_dtype(x.device.type, accuracy)
    if how == "planes":
        small = x.abs().amax(1, keepdim=True) < _SMALL  # their units would not be normal numbers
        lift = torch.where(small, _LIFT, 1.0) if bool(small.any()) else _NOTHING
        lifted = x * lift if lift.numel() else x
        return Operand(x, how, dtype, *_digits(lifted, 3 if accuracy == torch.float32 else 2), lift)
    return Operand(x.to(dtype), how, dtype, _NOTHING, _NOTHING, _NOTHING)


def product(operand: Operand, matrix: Tensor, change: Change | None = None, *, transposed: bool = False) -> Tensor:
    """X Mᵀ, [T, I] to [T, r], of a floating type; transposed: X M, [T, r] to [T, I], of float32 or float64.

    Args:
        operand: X.
        matrix: [r, I] int8 or float32.
        change: what becomes of M, block by block.
    """
    if matrix.dtype == torch.int8 and operand.how == "planes":
        return _planes(operand, matrix if transposed else matrix.T)
    if matrix.dtype == torch.int8 and operand.how == "triton":
        y = on_gpu.level_product(operand.x, matrix.T if transposed else matrix)
        return y.to(_sum_dtype(operand, transposed))
    x = operand.x.to(operand.dtype)
    new = x.new_zeros if transposed else x.new_empty  # zeros are written: a quarter of a small product
    out = new((len(x), matrix.shape[int(transposed)]), dtype=_sum_dtype(operand, transposed))
    for start, stop, block in _blocks(matrix, x.dtype, change):
        if transposed:
            out += x[:, start:stop] @ block
        else:
            out[:, start:stop] = x @ block.T
    return out


def product_of_blocks(
    operand: Operand,
    blocks: Iterable[tuple[int, Tensor]],
    change: Change | None = None,
    *,
    transposed: bool,
) -> Tensor:
    """The same with M as blocks of rows after their first ones; ``change`` has its places in M."""
    out: Tensor | None = None
    parts = []
    for start, levels in blocks:
        here = None if change is None else partial(_moved, change, start)
        some = operand.terms(start, start + len(levels)) if transposed else operand
        part = product(some, levels, here, transposed=transposed)
        if transposed:
            out = part if out is None else out.add_(part)
        else:
            parts.append(part)
    if out is not None:
        return out
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _moved(change: Change, first: int, start: int, block: Tensor) -> Tensor:
    return change(first + start, block)


def _sum_dtype(operand: Operand, transposed: bool) -> torch.dtype:
    """Of sums over blocks, which keep their bits."""
    return torch.promote_types(operand.dtype, torch.float32) if transposed else operand.dtype


def _blocks(matrix: Tensor, dtype: torch.dtype, change: Change | None) -> Iterator[tuple[int, int, Tensor]]:
    rows, columns = matrix.shape
    height = max(1, min(_BLOCK // max(columns, 1), -(-rows // _BLOCKS)))
    buffer = matrix.new_empty((height, columns), dtype=dtype)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        block = buffer[: stop - start].copy_(matrix[start:stop])
        yield start, stop, block if change is None else change(start, block)


def _digits(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows of x as ``count`` int8 digits times a unit each; the error is about 2^-8count of the peak of the row."""
    unit = x.abs().amax(1, keepdim=True).to(torch.float32).div_(127 * _DIGIT ** (count - 1))
    unit.clamp_min_(torch.finfo(torch.float32).tiny)
    digits = torch.empty((count, *x.shape), dtype=torch.int8, device=x.device)
    for start in range(0, len(x), _TOKENS):
        some = slice(start, start + _TOKENS)
        rest = (x[some] / unit[some]).round_().to(torch.int32)
        for digit in digits[:, some]:
            digit.copy_(rest)  # keeps the low byte, signed
            rest.sub_(digit).bitwise_right_shift_(8)
    return digits, unit


def _planes(operand: Operand, matrix: Tensor) -> Tensor:
    count, tokens, terms = operand.digits.shape
    digits = operand.digits.reshape(count * tokens, terms)
    # torch before 2.15 has wrong sums of a single term on processors with int8 dot products
    sums = torch._int_mm(digits, matrix) if terms > 1 else digits.int() * matrix.int()
    sums = sums.reshape(count, tokens, matrix.shape[1])
    total = sums[-1].to(torch.float32)
    for digit in range(count - 2, -1, -1):
        total.mul_(_DIGIT).add_(sums[digit])
    total.mul_(operand.unit)
    return total.div_(operand.lift) if operand.lift.numel() else total
