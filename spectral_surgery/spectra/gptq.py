"""GPTQ, the calibrated baseline: round-to-nearest in groups, with rounding errors fed forward into later columns."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.errors import ShapeError
from spectral_surgery.spectra.baselines import BaselineResult
from spectral_surgery.spectra.codec import Basis
from spectral_surgery.spectra.feedback import feedback_factor

_HALF = torch.finfo(torch.float16)


def gptq(weight: Tensor, moment: Tensor, *, bits: int, group: int = 128) -> BaselineResult:
    """Quantise a weight column by column, each taking up the errors of those before it.

    Args:
        weight: [O, I] float32.
        moment: H = Xᵀ X of the inputs, [I, I].
        bits: of a code.
        group: columns that share a float16 scale and a zero point of as many bits as a code, both found when the group
            has its turn.

    Returns:
        The weight as decoded, and its bytes.

    Raises:
        ShapeError: when H is not [I, I].
        ConfigError: when H is zero or not finite.

    Source:
        arXiv 2210.17323, algorithm 1, with 1 % damping and columns in their order.
    """
    rows, columns = weight.shape
    if tuple(moment.shape) != (columns, columns):
        raise ShapeError(f"gptq: H is {tuple(moment.shape)}; ({columns}, {columns}) is accepted.")
    factor = feedback_factor(moment, Basis("identity", columns, ()))
    rest, decoded, top = weight.clone(), torch.empty_like(weight), 2**bits - 1
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        low = rest[:, start:stop].amin(1).clamp_max(0)
        high = rest[:, start:stop].amax(1).clamp_min(0)
        scale = ((high - low) / top).clamp(_HALF.smallest_normal, _HALF.max).half().float()
        zero = (-low / scale).round().clamp(0, top)
        errors = torch.empty(rows, stop - start)
        for column in range(start, stop):
            values = rest[:, column]
            decoded[:, column] = ((values / scale).round().add(zero).clamp(0, top) - zero) * scale
            error = (values - decoded[:, column]) / factor[column, column]
            rest[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    groups = rows * -(-columns // group)
    return BaselineResult(decoded, -(-bits * weight.numel() // 8) + 2 * groups + -(-bits * groups // 8))
