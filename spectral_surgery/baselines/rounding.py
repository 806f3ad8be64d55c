"""Rounding to the nearest level, without data: integers per row or group, and NormalFloat."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.baselines.base import HALF, BaselineResult, in_groups, whole_bytes

# NormalFloat levels: quantiles of the normal distribution scaled to [-1, 1], with an exact zero.
# Source: Dettmers et al., QLoRA, arXiv 2305.14314, appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF4_BLOCK = 64
_ABSMAX_BLOCK = 256


def int8_rows(weight: Tensor) -> BaselineResult:
    """Round to 8 bits with one float32 scale per row, symmetric. ``weight`` is [O, I] float32."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (weight / scale).round().clamp(-127, 127)
    return BaselineResult(codes * scale, weight.numel() + 4 * len(weight))


def int_groups(weight: Tensor, *, bits: int, group: int) -> BaselineResult:
    """Round to nearest between the extremes of each group of a row: float16 scale, zero point.

    The zero point is an integer of as many bits as a code, as in common 4-bit checkpoints.

    ``group``: Weights that share a scale; the last group of a row may be shorter.
    """
    columns = weight.shape[1]
    top = 2**bits - 1
    groups = in_groups(weight, group)  # [O, G, group]
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    high = groups.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / top).clamp(HALF.smallest_normal, HALF.max).half().float()
    zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale).round().add(zero).clamp(0, top)
    decoded = ((codes - zero) * scale).flatten(1)[:, :columns]
    count = groups.shape[0] * groups.shape[1]
    stored = whole_bytes(bits * weight.numel()) + 2 * count + whole_bytes(bits * count)
    return BaselineResult(decoded, stored)


def nf4(weight: Tensor) -> BaselineResult:
    """NormalFloat of 4 bits in blocks of 64, their maxima quantised to 8 bits in blocks of 256.

    Blocks run over the weight row by row. Counted: codes, 8-bit maxima, one float32 scale for 256
    maxima, one float32 mean. The two constant tables of levels are not.

    Source:
        arXiv 2305.14314; the layout is that of bitsandbytes, with double quantisation.
    """
    blocks = in_groups(weight.reshape(1, -1), _NF4_BLOCK)[0]  # [M, 64]
    peaks = blocks.abs().amax(1)
    codes = _nearest(_divide(blocks, peaks[:, None]), torch.tensor(NF4_LEVELS))
    mean = peaks.mean()
    centred = in_groups((peaks - mean).reshape(1, -1), _ABSMAX_BLOCK)[0]  # [M / 256, 256]
    scale = centred.abs().amax(1, keepdim=True)
    rounded = _nearest(_divide(centred, scale), _dynamic_levels()) * scale
    decoded_peaks = rounded.reshape(-1)[: len(peaks)] + mean
    decoded = (codes * decoded_peaks[:, None]).reshape(-1)[: weight.numel()]
    stored = whole_bytes(4 * weight.numel()) + len(peaks) + 4 * len(scale) + 4
    return BaselineResult(decoded.reshape(weight.shape), stored)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    levels = levels.to(x.device)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, x / scale, 0)


def _dynamic_levels() -> Tensor:
    """[256] levels in [-1, 1]: seven decades, each with twice the levels of the one below.

    Source: Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(decades)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values
