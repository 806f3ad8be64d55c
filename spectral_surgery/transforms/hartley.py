"""The discrete Hartley transform: the real twin of the Fourier transform, its own inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_surgery.transforms.base import Transform, any_length


def matrix(n: int) -> Tensor:
    """Return the [n, n] float64 matrix (cos + sin)(2 pi j k / n) / sqrt(n); it is symmetric."""
    k = torch.arange(n, device="cpu")
    # whole turns removed as integers: the angle stays exact for long axes
    angle = (torch.outer(k, k) % n).double() * (2 * math.pi / n)  # [k, j]
    return (angle.cos() + angle.sin()) / math.sqrt(n)


HARTLEY = Transform(
    "hartley", matrix, any_length, source="Bracewell, Discrete Hartley transform, J. Opt. Soc. Am. 73(12), 1983"
)
