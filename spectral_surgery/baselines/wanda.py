"""Wanda: pruning by weight times the norm of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.baselines.base import BaselineResult
from spectral_surgery.baselines.prune import kept_at, pruned


def wanda(weight: Tensor, moment: Tensor, bits: float) -> BaselineResult:
    """Keep in each row the weights with the largest |W_ij| ‖X_j‖; nothing is updated.

    Args:
        bits: Budget in bits per weight, above 1: a bitmap, and what is kept in bfloat16.

    Raises:
        ConfigError: If the budget leaves no room for a weight beside the bitmap.
    Source:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, equation 1.
    """
    kept = kept_at("wanda", weight, bits)
    return pruned(torch.where(wanda_mask(weight, moment, kept), weight, 0).bfloat16().float(), kept)


def wanda_mask(weight: Tensor, moment: Tensor, kept: int) -> Tensor:
    """What is kept: the same number in each row, the first rows one more where that does not come out even.

    Returns [O, I] bool.
    """
    rows = len(weight)
    scores = weight.abs() * moment.diagonal().clamp_min(0).sqrt()
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts = kept // rows + (torch.arange(rows) < kept % rows).long()
    return rank < counts[:, None]
