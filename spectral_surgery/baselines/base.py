"""What a baseline is: a function of a weight matrix, with every byte counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, ShapeError

HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class BaselineResult:
    """A compressed weight.

    Attributes:
        weight: [O, I] float32, as decoded.
        stored_bytes: Codes, scales, zero points, bitmaps and factors.
    """

    weight: Tensor
    stored_bytes: int


@dataclass(frozen=True)
class Baseline:
    """One row of BASELINES.

    Attributes:
        family: What it shares with the same method at other rates; plots join them.
        method: ([O, I] float32[, H][, bits per weight]) to the result; see `apply`.
        budgeted: Whether it needs a rate, which it never exceeds; others have a fixed one.
        above: Bits per weight that a rate must exceed, such as those of a bitmap.
        without_inputs: Of a calibrated one, the name of the baseline that stands in for it where no inputs are known,
            as for embeddings; empty for one that is not calibrated.
    """

    name: str
    label: str
    family: str
    method: Callable[..., BaselineResult]
    help: str
    budgeted: bool = False
    above: float = 0.0
    without_inputs: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether it needs the second moment of the inputs."""
        return bool(self.without_inputs)

    def apply(self, weight: Tensor, bits: float | None = None, moment: Tensor | None = None) -> BaselineResult:
        """Compress a matrix.

        Args:
            weight: [O, I], floating and finite.
            moment: H = Xᵀ X of the inputs, [I, I], for a calibrated baseline; others ignore it.

        Raises:
            ShapeError: If the weight is not a matrix, or H is not of its columns.
            ConfigError: If the weight is not floating and finite, or a rate or H is missing, too low or not finite.
        """
        weight = _checked(weight)
        arguments: list[object] = []
        if self.calibrated:
            columns = weight.shape[1]
            if moment is None:
                raise ConfigError(f"{self.name}: expected H = Xᵀ X, [{columns}, {columns}], got no inputs to go by.")
            if tuple(moment.shape) != (columns, columns):
                raise ShapeError(f"{self.name}: expected H of shape ({columns}, {columns}), got {tuple(moment.shape)}.")
            arguments.append(moment)
        if self.budgeted:
            if bits is None or not math.isfinite(bits):
                raise ConfigError(
                    f"{self.name}: expected finite bits per weight to meet, got {bits}. Give those of the"
                    " compression to compare with."
                )
            arguments.append(bits)
        return self.method(weight, *arguments)


def in_groups(x: Tensor, size: int) -> Tensor:
    """[rows, n] to [rows, ceil(n / size), size]; zeros fill the last group, neutral to extremes."""
    short = -x.shape[1] % size
    return torch.nn.functional.pad(x, (0, short)).reshape(x.shape[0], -1, size)


def whole_bytes(bits: int) -> int:
    """Bytes that hold a number of bits."""
    return -(-bits // 8)


def _checked(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.numel():
        raise ShapeError(f"baseline: expected a non-empty matrix [O, I], got a weight of shape {tuple(weight.shape)}.")
    if not weight.is_floating_point():
        raise ConfigError(f"baseline: expected floating weights, got {weight.dtype}.")
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise ConfigError("baseline: expected a weight that is finite in float32, got NaN or infinite values.")
    return wide
