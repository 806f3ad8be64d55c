"""Truncated SVD: two thin factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_surgery.baselines.base import BaselineResult
from spectral_surgery.errors import ConfigError


def svd(weight: Tensor, bits: float) -> BaselineResult:
    """Keep the largest singular values, as two bfloat16 factors that share them evenly.

    Raises ConfigError if the budget does not hold one singular value.
    """
    of_one = 2 * sum(weight.shape)
    rank = min(math.floor(bits * weight.numel() / 8) // of_one, *weight.shape)
    if rank < 1:
        raise ConfigError(
            f"svd: expected at least {8 * of_one / weight.numel():.4g} bits per weight, which hold rank 1, got"
            f" {bits:g}."
        )
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    up = (left[:, :rank] * root).bfloat16().float()  # [O, R]
    down = (root[:, None] * right[:rank]).bfloat16().float()  # [R, I]
    return BaselineResult(up @ down, rank * of_one)
