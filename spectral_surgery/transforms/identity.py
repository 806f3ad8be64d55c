"""The transform that changes nothing: the control that shows what the others gain."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.transforms.base import Transform, any_length


def matrix(n: int) -> Tensor:
    """Return the [n, n] float64 identity."""
    return torch.eye(n, dtype=torch.float64, device="cpu")


IDENTITY = Transform("identity", matrix, any_length, source="the unit matrix")
