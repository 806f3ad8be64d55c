"""The discrete cosine transform (DCT-II), scaled to be orthonormal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_surgery.transforms.base import Transform, any_length


def matrix(n: int) -> Tensor:
    """Return the [n, n] float64 DCT-II: row k is c_k cos(pi (2 j + 1) k / 2n) over points j.

    c_0 = sqrt(1/n), else c_k = sqrt(2/n).
    """
    k = torch.arange(n, device="cpu")
    # whole turns removed as integers: the angle stays exact for long axes
    quarter = torch.outer(k, 2 * k + 1) % (4 * n)  # [k, j]
    basis = torch.cos(quarter.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
    basis[0] = math.sqrt(1 / n)
    return basis


DCT = Transform(
    "dct", matrix, any_length, source="Ahmed, Natarajan and Rao, Discrete Cosine Transform, IEEE Trans. Computers, 1974"
)
