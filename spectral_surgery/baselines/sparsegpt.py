"""SparseGPT: pruning column by column, with what is lost made up for by the columns after it."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.baselines.base import BaselineResult
from spectral_surgery.baselines.prune import kept_at, pruned
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import feedback_factor
from spectral_surgery.sparse.tensor import largest

_DAMPING = 0.01  # of the mean of the diagonal, as published
_BLOCK = 128  # columns whose mask is chosen at once


def sparsegpt(weight: Tensor, moment: Tensor, bits: float) -> BaselineResult:
    """Prune a weight by optimal brain surgery in the order of its columns.

    Args:
        bits: Budget in bits per weight, above 1: a bitmap, and what is kept in bfloat16, whose rounding errors are
            made up for, too.

    Raises:
        ConfigError: If the budget leaves no room for a weight beside the bitmap, or H is zero or not finite.
    Source:
        Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1, with 1 % damping and blocks of 128 columns, of
        each of which the same share is kept.
    """
    kept = kept_at("sparsegpt", weight, bits)
    rows, columns = weight.shape
    factor = feedback_factor(moment, Basis("identity", columns, ()), _DAMPING)
    rest, decoded = weight.clone(), torch.zeros_like(weight)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        count = kept * stop // columns - kept * start // columns
        scores = (rest[:, start:stop] / factor.diagonal()[start:stop]).square()
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        if count:
            mask[largest(scores.reshape(-1), count)] = True
        mask = mask.reshape(scores.shape)
        errors = torch.empty(rows, stop - start)
        for column in range(start, stop):
            values = rest[:, column]
            decoded[:, column] = torch.where(mask[:, column - start], values, 0).bfloat16().float()
            error = (values - decoded[:, column]) / factor[column, column]
            rest[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return pruned(decoded, kept)
