"""How mixers meet padding and caches: a mixer itself only sees sequences without gaps.

A mask is honoured by taking the padding out. Zeroing it would not do: the length of a sequence sets the frequencies
of its transform and the chunks of its gates, so that the rest of the batch would change its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from spectral_surgery.errors import ShapeError
from spectral_surgery.mixers.base import refuse_cache, require_tokens
from spectral_surgery.mixers.cache import MixerCache


class CausalCore(Protocol):
    """What a causal mixer provides for `run_causal`."""

    width: int

    def mix(self, x: Tensor, lengths: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """Mix whole sequences [B, T, D], and fill a cache with their end.

        Args:
            x: [B, T, D], each sequence from the left.
            lengths: [B] int64 on the CPU, tokens of each; None for T. Only the filling of a cache needs it.
        """
        ...

    def step(self, x: Tensor, cache: MixerCache) -> Tensor:
        """Mix one more token [B, D] of each sequence; ``cache.lengths`` were seen before it."""
        ...


def run_bidirectional(
    mix: Callable[[Tensor], Tensor], width: int, x: Tensor, mask: Tensor | None, cache: MixerCache | None
) -> Tensor:
    """Apply a mixer of whole sequences, sequences of the same length together.

    Returns [B, T, D] in the dtype of x, zero at padding.

    Args:
        mix: [B, T, D] to [B, T, D].
        x: [B, T, D].
        mask: [B, T] or None.
        cache: must be None.

    Raises:
        ShapeError: when x or mask do not fit.
        CausalityError: when there is a cache.
    """
    require_tokens(x, width, mask)
    if cache is not None:
        refuse_cache("cache")
    if mask is None or bool(mask.all()):
        return mix(x).to(x.dtype)
    order, lengths = _real_first(mask)
    y = torch.zeros_like(x)
    for length in sorted(set(lengths.tolist()) - {0}):
        rows = (lengths == length).nonzero().to(x.device)  # [b, 1]
        places = order[rows[:, 0], :length]  # [b, length]
        y[rows, places] = mix(x[rows, places]).to(x.dtype)
    return y


def run_causal(core: CausalCore, x: Tensor, mask: Tensor | None, cache: MixerCache | None) -> Tensor:
    """Apply a causal mixer to whole sequences, or continue those of a cache.

    Returns [B, T, D] in the dtype of x, zero at padding.

    Args:
        x: [B, T, D].
        mask: [B, T] or None; of these T tokens only.
        cache: or None; an empty one takes a whole prompt at once, a used one a token at a time.

    Raises:
        ShapeError: when x, mask or cache do not fit.
    """
    require_tokens(x, core.width, mask)
    if cache is not None and len(cache.lengths) != len(x):
        raise ShapeError(
            f"mixer: expected {len(cache.lengths)} sequences, as the cache has, got {len(x)}. Use new_cache."
        )
    if mask is not None and bool(mask.all()):
        mask = None
    if cache is None or not bool(cache.lengths.any()):
        return _whole(core, x, mask, cache)
    real = [None] * x.shape[1] if mask is None else mask.bool().unbind(1)
    return torch.stack([_next(core, token, now, cache) for token, now in zip(x.unbind(1), real, strict=True)], 1)


def _whole(core: CausalCore, x: Tensor, mask: Tensor | None, cache: MixerCache | None) -> Tensor:
    if mask is None:
        lengths = torch.full((len(x),), x.shape[1])
        y = core.mix(x, None, cache).to(x.dtype)
    else:
        order, lengths = _real_first(mask)
        rows = torch.arange(len(x), device=x.device)[:, None]
        there = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]  # [B, T]
        mixed = core.mix(torch.where(there[..., None], x[rows, order], 0), lengths, cache).to(x.dtype)
        y = torch.zeros_like(x).index_put((rows, order), torch.where(there[..., None], mixed, 0))
    if cache is not None:
        cache.lengths = lengths
    return y


def _next(core: CausalCore, x: Tensor, real: Tensor | None, cache: MixerCache) -> Tensor:
    if real is None or bool(real.all()):
        y = core.step(x, cache).to(x.dtype)
        cache.lengths = cache.lengths + 1
        return y
    rows = real.nonzero()[:, 0]
    y = torch.zeros_like(x)
    if len(rows):
        part = cache.select(rows)
        y[rows] = core.step(x[rows], part).to(x.dtype)
        part.lengths = part.lengths + 1
        cache.write(rows, part)
    return y


def _real_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the tokens, real ones first and in order [B, T]; how many are real [B], on the CPU."""
    real = mask.bool()
    return torch.argsort(~real, dim=1, stable=True), real.sum(1).cpu()
