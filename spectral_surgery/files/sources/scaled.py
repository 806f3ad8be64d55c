"""Numbers of few bits times scales, one for each block of a matrix; a row or a whole matrix can be a block too.

Blocks at the lower and the right edge of a matrix may be cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spectral_surgery.files.header import TensorInfo
from spectral_surgery.files.reader import read_flat
from spectral_surgery.files.sources.base import wrong

_BIAS = 127  # of an exponent that is stored as a byte


@dataclass(frozen=True)
class Scaled:
    """A tensor as numbers and scales; experts are stacked.

    Attributes:
        values: [..., O, I], of a dtype of 8 bits.
        scales: one for each block of each matrix, in their order.
        block: rows and columns of a block.
        divisor: of the scales.
    """

    values: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
    divisor: float = 1.0

    @property
    def stored_bytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of all matrices, one above the other: [R, I] bfloat16.

        Raises CheckpointError when a scale is not finite.
        """
        height, width = matrix_of(self.values.shape)
        tall, wide = self.block
        made = read_flat(self.values, start * width, stop * width).reshape(-1, width).float()
        row = torch.arange(start, stop)
        block = row // height * -(-height // tall) + row % height // tall  # among those of all matrices
        scales = self._scales(int(block[0]), int(block[-1]) + 1, -(-width // wide))[block - block[0]]
        whole = width // wide * wide
        if whole:
            made[:, :whole].unflatten(1, (-1, wide)).mul_(scales[:, : width // wide, None])
        if whole < width:
            made[:, whole:].mul_(scales[:, -1:])
        return made.bfloat16()

    def _scales(self, start: int, stop: int, columns: int) -> Tensor:
        """Rows of blocks: [B, columns] float32."""
        stored = read_flat(self.scales, start * columns, stop * columns).reshape(-1, columns)
        scales = torch.exp2(stored.float() - _BIAS) if stored.dtype == torch.uint8 else stored.float()
        if not bool(torch.isfinite(scales).all()):
            raise wrong(self.scales, "has NaN or infinite scales; expected finite ones.")
        return scales / self.divisor if self.divisor != 1 else scales


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a matrix of a stack; a vector is one row."""
    return (shape[-2] if len(shape) > 1 else 1), (shape[-1] if shape else 1)


def scaled(values: TensorInfo, scales: TensorInfo, block: tuple[int, int] | None, *, divisor: float = 1.0) -> Scaled:
    """Numbers and their scales, which are one for each block, for each row, or for each matrix.

    Args:
        scales: F32, BF16, F16, F8_E8M0, or U8 for exponents of two.
        block: rows and columns of a block; None when there are none.

    Raises:
        CheckpointError: when the scales have another shape than any of that.
    """
    height, width = matrix_of(values.shape)
    stack = values.shape[:-2]
    rows = ((*stack, height), (*stack, height, 1))
    if block is not None:
        grid = (*stack, -(-height // block[0]), -(-width // block[1]))
        if scales.shape == grid:
            return Scaled(values, scales, block, divisor)
    if scales.numel == prod(stack):
        return Scaled(values, scales, (height, width), divisor)
    if scales.shape in rows:
        return Scaled(values, scales, (1, width), divisor)
    wanted = "one, or one for each row" if block is None else f"{list(grid)}, for blocks of {block[0]} x {block[1]}"
    raise wrong(scales, f"has the shape {list(scales.shape)} for a weight of {list(values.shape)}; expected {wanted}.")
