"""The Walsh-Hadamard transform in Sylvester order, scaled to be orthonormal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_surgery.transforms.base import Transform, power_of_two


def matrix(n: int) -> Tensor:
    """Return the [n, n] float64 matrix of signs (-1)^popcount(j & k) / sqrt(n); n = 2^m."""
    basis = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(basis) < n:
        basis = torch.cat([torch.cat([basis, basis], 1), torch.cat([basis, -basis], 1)])
    return basis / math.sqrt(n)


HADAMARD = Transform(
    "hadamard",
    matrix,
    power_of_two,
    source="Sylvester's doubling construction, Philosophical Magazine 34, 1867",
    lengths="a power of two",
)
