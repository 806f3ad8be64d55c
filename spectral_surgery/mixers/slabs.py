"""Long inputs a slab at a time: temporaries stay small.

Memory is only part of the reason. An allocator gets a large temporary from the system anew each time, and touching it
for the first time takes longer than the arithmetic does; small ones are used again, and are still in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SLAB = 1 << 20  # entries of a temporary


def channel_slabs(x: Tensor, group: int = 1, *, split: bool = True) -> list[slice]:
    """Cut the channels of x [B, T, D] into runs.

    Args:
        group: channels that belong together, D a multiple: a run is a part of one group, or some whole ones.
        split: whether a part of a group may be a run.
    """
    share = max(1 if split else group, SLAB * x.shape[2] // x.numel())
    if share >= group:
        share -= share % group
    else:
        share = next(size for size in range(share, 0, -1) if group % size == 0)
    return _runs(x.shape[2], share)


def token_slabs(x: Tensor, count: int, multiple: int = 1) -> list[slice]:
    """Cut some tokens of x [B, T, D] into runs. ``multiple``: of which runs start at a multiple."""
    share = max(1, SLAB * x.shape[1] // x.numel())
    return _runs(count, max(share // multiple, 1) * multiple)


def in_slabs(function: Callable[[slice], Tensor], runs: Sequence[slice], like: Tensor, dim: int) -> Tensor:
    """Join what a function makes of runs of channels or tokens.

    Where gradients are recorded it is called once for all: autograd keeps its temporaries anyway.

    Args:
        runs: of everything there is along the dimension.
        like: has the shape, dtype and device of the output.
        dim: 1 for tokens, 2 for channels.
    """
    if len(runs) == 1 or torch.is_grad_enabled():
        return function(slice(0, like.shape[dim]))
    y = like.new_empty(like.shape)
    for run in runs:
        y.narrow(dim, run.start, run.stop - run.start).copy_(function(run))
    return y


def _runs(count: int, share: int) -> list[slice]:
    return [slice(start, min(start + share, count)) for start in range(0, count, share)]
