"""Magnitude pruning, and what all pruning stores: a bitmap, and what is kept in bfloat16."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_surgery.baselines.base import BaselineResult, whole_bytes
from spectral_surgery.errors import ConfigError
from spectral_surgery.sparse.tensor import largest


def prune(weight: Tensor, bits: float) -> BaselineResult:
    """Keep the largest weights as bfloat16 and a bitmap of where they are.

    Raises ConfigError if the budget leaves no room for a weight beside the bitmap.
    """
    kept = kept_at("prune", weight, bits)
    flat = weight.reshape(-1)
    positions = largest(flat.abs(), kept)
    decoded = torch.zeros_like(flat)
    decoded[positions] = flat[positions].bfloat16().float()
    return pruned(decoded.reshape(weight.shape), kept)


def kept_at(name: str, weight: Tensor, bits: float) -> int:
    """How many weights fit into a budget beside the bitmap. Returns 1 to O * I. Raises ConfigError if none does."""
    bitmap = whole_bytes(weight.numel())
    kept = min((math.floor(bits * weight.numel() / 8) - bitmap) // 2, weight.numel())
    if kept < 1:
        raise ConfigError(
            f"{name}: expected more than {8 * (bitmap + 2) / weight.numel():.4g} bits per weight, which hold a"
            f" bitmap and one value, got {bits:g}."
        )
    return kept


def pruned(weight: Tensor, kept: int) -> BaselineResult:
    """A pruned weight and its bytes. ``weight`` is [O, I] float32, values of bfloat16."""
    return BaselineResult(weight, whole_bytes(weight.numel()) + 2 * kept)
