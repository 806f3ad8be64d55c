"""Half-quadratic quantisation (HQQ): round-to-nearest in groups, with zero points that outliers do not pull."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.baselines.base import HALF, BaselineResult, in_groups, whole_bytes

# as published and as the library has them by default
_NORM, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 20


def hqq(weight: Tensor, *, bits: int, group: int = 64) -> BaselineResult:
    """Round to the levels between the extremes of each group of a row, shifted to where the l_p error is least.

    Args:
        group: Weights that share a float16 scale and a float16 zero point; the last group of a row may be shorter.
    Source:
        Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, mobiusml.github.io/hqq_blog,
        with the settings of the library (github.com/mobiusml/hqq): p = 0.7, beta = 10 growing by 1.01, 20 iterations.
    """
    columns, top = weight.shape[1], 2**bits - 1
    groups = in_groups(weight, group)  # [O, G, group]
    real = in_groups(torch.ones_like(weight[:1]), group)  # [1, G, group], zero where the last group is filled up
    low = torch.where(real > 0, groups, torch.inf).amin(-1, keepdim=True)
    high = torch.where(real > 0, groups, -torch.inf).amax(-1, keepdim=True)
    # a zero point must fit into float16, too
    least = torch.maximum(low.abs(), high.abs()).div(HALF.max / 2).clamp_min(HALF.smallest_normal)
    scale = torch.maximum((high - low) / top, least).clamp_max(HALF.max).half().float()
    zero = zero_points(groups, real, scale, -low / scale, top).half().float()
    codes = (groups / scale + zero).round().clamp(0, top)
    decoded = ((codes - zero) * scale).flatten(1)[:, :columns]
    count = groups.shape[0] * groups.shape[1]
    return BaselineResult(decoded, whole_bytes(bits * weight.numel()) + 4 * count)


def zero_points(groups: Tensor, real: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Solve for the zero points of given scales.

    In turn, what is left by rounding, e, is shrunk to the proximal point of the l_p norm, which leaves outliers, and
    the zero point becomes what is best for the rest in the least squares. Returns [O, G, 1], of the iteration with the
    least mean absolute error; iterations stop where it no longer falls.

    ``real``: [1, G, group], 1 where there is a weight.
    """
    best, least, beta, count = zero, float("inf"), _BETA, real.sum(-1, keepdim=True)
    for _ in range(_ITERATIONS):
        codes = (groups / scale + zero).round().clamp(0, top)
        left = groups - (codes - zero) * scale
        error = float((left.abs() * real).sum())
        if error >= least:
            break
        best, least = zero, error
        outliers = shrink(left, beta)
        zero = ((codes - (groups - outliers) / scale) * real).sum(-1, keepdim=True) / count
        beta *= _KAPPA
    return best


def shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal point of the l_p norm, p < 1, as approximated there: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    size = x.abs()
    return x.sign() * (size - size.pow(_NORM - 1) / beta).clamp_min(0)  # |0|^(p-1) is infinite, and gives 0
