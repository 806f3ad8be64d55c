"""What stands in place of an attention module: a mixer that is called as attention is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError
from spectral_surgery.mixers import MixerCache, ProjectedMixer

_MEMORY = "spectral_mixer"  # attribute of a layer of the host's cache


class SwappedAttention(nn.Module):
    """A `ProjectedMixer` that takes what transformers gives to attention, and returns what it expects.

    Attention masks are reduced to what they say about padding; documents packed into one sequence are not kept apart.
    """

    def __init__(self, projected: ProjectedMixer, layer: int) -> None:
        """Stand for the attention of a layer."""
        super().__init__()
        self.projected, self.layer = projected, layer
        self.register_forward_pre_hook(_from_host, with_kwargs=True)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> tuple[Tensor, None]:
        """Mix tokens.

        Args:
            x: [B, T, D].
            mask: as transformers prepares it: None, [B, tokens], or [B, 1, T, tokens], the last T of them these.
            cache: of transformers, dynamic; or None.

        Returns:
            ([B, T, D], no attention weights).
        """
        real = real_tokens(mask, x)
        if cache is None:
            return self.projected(x, real), None
        memory, tokens = self._recalled(cache, x)
        y = self.projected(x, real, memory)
        setattr(cache.layers[self.layer], _MEMORY, (memory, tokens))
        return y, None

    def _recalled(self, cache: Any, x: Tensor) -> tuple[MixerCache, int]:
        """The memory of the mixer, and how many tokens it will have seen.

        The cache keeps the number of its row for every token. Whatever it does to its rows later, for beams or for
        batches that shrink, tells from the numbers and is done to the memory of the mixer too.
        """
        batch, tokens = x.shape[:2]
        past = int(cache.get_seq_length(self.layer))
        numbers = torch.arange(batch, device=x.device).reshape(batch, 1, 1, 1).expand(batch, 1, tokens, 1)
        kept, _ = cache.update(numbers, numbers, self.layer)
        if kept.shape[2] > past + tokens:
            raise ConfigError(
                f"layer {self.layer}: expected a dynamic cache, got one with room for {kept.shape[2]} tokens from the"
                " start. Use cache_implementation='dynamic'."
            )
        if not past:
            return self.projected.new_cache(batch, x.device, x.dtype), tokens
        memory, seen = getattr(cache.layers[self.layer], _MEMORY, (None, 0))
        if memory is None or seen != past:
            raise ConfigError(
                f"layer {self.layer}: expected a cache that is only ever continued, got one of {past} tokens, of which"
                f" the mixer has seen {seen}. Start again with an empty one."
            )
        rows = kept[:, 0, -tokens - 1, 0]
        if len(rows) != len(memory.lengths) or not torch.equal(rows, numbers[:, 0, 0, 0]):
            memory = memory.select(rows)
        return memory, past + tokens


def real_tokens(mask: Any, x: Tensor) -> Tensor | None:
    """Which tokens are no padding: those that attention lets see themselves.

    Args:
        mask: as for `SwappedAttention`; boolean, or numbers of which the least mean no.
        x: [B, T, D].

    Returns:
        [B, T] bool, or None for all.

    Raises:
        ConfigError: for masks of other kinds.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ConfigError(
            f"attention mask: expected [B, tokens] or [B, 1, T, tokens], got {shape}. Load the model with"
            " attn_implementation='sdpa'."
        )
    batch, tokens = x.shape[:2]
    if mask.ndim == 4:
        rows = mask[:, 0, :, -tokens:]  # [B, T or 1, T]
        mask = rows[:, 0] if rows.shape[1] == 1 else rows.diagonal(dim1=1, dim2=2)
        if mask.is_floating_point():
            mask = mask > torch.finfo(mask.dtype).min / 2
    real: Tensor = mask[:, -tokens:].bool().expand(batch, tokens)
    return real


def _from_host(
    module: nn.Module,  # noqa: ARG001 - the signature of hooks
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What families pass in different ways, as `SwappedAttention.forward` takes it."""
    x = args[0] if args else named["hidden_states"]
    cache = named.get("cache", named.get("past_key_values"))  # renamed in transformers 5.24
    return (x, named.get("attention_mask"), getattr(cache, "self_attention_cache", cache)), {}
