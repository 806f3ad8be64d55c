"""Long inputs a few channels at a time: temporaries stay small, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SLAB = 1 << 20  # entries of a temporary


def in_slabs(function: Callable[..., Tensor], inputs: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Apply a function to slices of its inputs, where the first is long, and join what it gives.

    In training the function is computed again in the backward pass, so that only the inputs are kept.

    Args:
        function: of one slice of each input; its result has the shape of the first slice.
        inputs: the first decides how many slices there are.
        dims: along which each input is cut, the same size in all.
    """
    dim, size = dims[0], inputs[0].shape[dims[0]]
    share = max(1, SLAB * size // inputs[0].numel())
    if share >= size:
        return function(*inputs)
    cut = [torch.split(x, share, dim) for x, dim in zip(inputs, dims, strict=True)]
    if torch.is_grad_enabled():
        again = [
            checkpoint(function, *parts, use_reentrant=False, preserve_rng_state=False)
            for parts in zip(*cut, strict=True)
        ]
        return torch.cat(again, dim)
    outputs = (function(*parts) for parts in zip(*cut, strict=True))
    first = next(outputs)
    joined = first.new_empty(inputs[0].shape)
    joined.narrow(dim, 0, share).copy_(first)
    for number, y in enumerate(outputs, 1):
        joined.narrow(dim, number * share, y.shape[dim]).copy_(y)
    return joined
