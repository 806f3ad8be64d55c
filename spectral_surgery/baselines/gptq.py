"""GPTQ: round-to-nearest in groups, with rounding errors fed forward into later columns."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.baselines.base import HALF, BaselineResult, in_groups, whole_bytes
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import feedback_factor

_GRID, _SHRUNK, _POWER = 100, 0.8, 2.4  # ranges tried, how far they shrink, and the norm they are judged by
_DAMPING = 0.01  # of the mean of the diagonal, as published


def gptq(
    weight: Tensor, moment: Tensor, *, bits: int, group: int = 128, reorder: bool = True, search: bool = True
) -> BaselineResult:
    """Quantise a weight column by column, each taking up the errors of those before it.

    Args:
        group: columns that share a float16 scale and a zero point of as many bits as a code.
        reorder: columns with the strongest inputs first (act-order), with the groups of the original weight (static
            groups), which need nothing stored; else columns in their order, and groups found when they have their turn.
        search: whether the range of a group may be narrower than its extremes, where that rounds it better.

    Raises:
        ConfigError: when H is zero or not finite.
    Source:
        Frantar et al., arXiv 2210.17323, algorithm 1, with 1 % damping; act-order, static groups and the search are
        options of the authors' implementation (github.com/IST-DASLab/gptq).
    """
    rows, columns = weight.shape
    order = moment.diagonal().argsort(descending=True, stable=True) if reorder else torch.arange(columns)
    factor = feedback_factor(moment[order][:, order], Basis("identity", columns, ()), _DAMPING)
    top = 2**bits - 1
    rest, decoded = weight[:, order], torch.empty_like(weight)
    static = [grid[:, order // group] for grid in group_grids(weight, top, group, search=search)]  # [O, I] each
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        scale, zero = (grid[:, start:stop] for grid in static)
        if not reorder:
            grids = group_grids(rest[:, start:stop], top, group, search=search)
            scale, zero = (grid.expand(rows, stop - start) for grid in grids)
        errors = torch.empty(rows, stop - start)
        for column in range(start, stop):
            values, at = rest[:, column], column - start
            codes = (values / scale[:, at]).round().add(zero[:, at]).clamp(0, top)
            rounded = (codes - zero[:, at]) * scale[:, at]
            error = (values - rounded) / factor[column, column]
            rest[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, at], decoded[:, order[column]] = error, rounded
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    groups = rows * -(-columns // group)
    return BaselineResult(decoded, whole_bytes(bits * weight.numel()) + 2 * groups + whole_bytes(bits * groups))


def group_grids(weight: Tensor, top: int, group: int, *, search: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group of a row.

    Returns both [O, ceil(I / group)] float32: scales of float16, and integers from 0 to top.

    Args:
        group: columns of a group; the last one may be shorter.
        search: whether to try narrower ranges than from the least to the largest weight.
    """
    groups = in_groups(weight, group)  # [O, G, group]
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    best, least = _grid(low, high, top), torch.full_like(low, torch.inf)
    for step in range(int(_SHRUNK * _GRID) if search else 0):
        share = 1 - step / _GRID
        scale, zero = _grid(share * low, share * high, top)
        codes = (groups / scale[..., None]).round().add(zero[..., None]).clamp(0, top)
        error = ((codes - zero[..., None]) * scale[..., None] - groups).abs().pow(_POWER).sum(-1)
        better = error < least
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        least = torch.where(better, error, least)
    return best


def _grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    scale = ((high - low) / top).clamp(HALF.smallest_normal, HALF.max).half().float()
    return scale, (-low / scale).round().clamp(0, top)
