"""Attention within a window of neighbours, by `scaled_dot_product_attention` on blocks: linear in T."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_surgery.mixers.base import refuse_cache, require_heads, require_range
from spectral_surgery.mixers.cache import MixerCache, last_tokens
from spectral_surgery.mixers.run import run_bidirectional, run_causal
from spectral_surgery.mixers.slabs import in_slabs, token_slabs


class WindowAttention(nn.Module):
    """Multi-head attention in which a token sees its neighbours.

    Causal: the `window` newest tokens, itself included. Else: `window // 2` tokens on either side and itself.
    Queries go in blocks; the keys of a block are those of its neighbours, under a band mask.
    """

    def __init__(self, width: int, heads: int, window: int, is_causal: bool) -> None:
        """Draw the projections.

        Args:
            heads: a divisor of D.
            is_causal: whether later tokens are out of view.

        Raises:
            ConfigError: when a setting is out of range.
        """
        super().__init__()
        require_heads(heads, width)
        require_range("window", window, 1 if is_causal else 2)
        self.width, self.heads, self.window, self.is_causal = width, heads, window, is_causal
        self.before, self.after = (window - 1, 0) if is_causal else (window // 2, window // 2)
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        if self.is_causal:
            return run_causal(self, x, mask, cache)
        return run_bidirectional(self.mix, self.width, x, mask, cache)

    def mix(self, x: Tensor, lengths: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `CausalCore.mix`; [B, T, D]."""
        if cache is not None:
            _, key, value = self.inputs(last_tokens(x, lengths, self.window)).chunk(3, -1)
            cache.states["keys"], cache.states["values"] = key, value

        def attended(tokens: slice) -> Tensor:
            first = max(tokens.start - self.before, 0)
            return self._attend(x[:, first : tokens.stop + self.after])[:, tokens.start - first :][
                :, : tokens.stop - tokens.start
            ]

        return in_slabs(attended, token_slabs(x, x.shape[1]), x, 1)

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).chunk(3, -1)
        batch, tokens, size = len(x), x.shape[1], max(1, self.before)
        blocks = -(-tokens // size)
        short = blocks * size - tokens
        queries = nn.functional.pad(query, (0, 0, 0, short)).reshape(-1, size, self.width)  # [B J, S, D]
        near = (0, 0, size, short + self.after)
        keys, values = (nn.functional.pad(part, near).unfold(1, 2 * size + self.after, size) for part in (key, value))
        attended = nn.functional.scaled_dot_product_attention(
            self._split(queries),
            self._split(keys.flatten(0, 1).transpose(1, 2)),
            self._split(values.flatten(0, 1).transpose(1, 2)),
            self._band(tokens, size, x.device).repeat(batch, 1, 1, 1),
        )  # [B J, H, S, D / H]
        y = attended.transpose(1, 2).flatten(2).reshape(batch, blocks * size, self.width)[:, :tokens]
        return self.output(y)  # type: ignore[no-any-return]

    def step(self, x: Tensor, cache: MixerCache) -> Tensor:
        """As `CausalCore.step`; [B, D]."""
        query, key, value = self.inputs(x).chunk(3, -1)
        keys, values = cache.push("keys", key), cache.push("values", value)  # [B, window, D]
        ages = torch.arange(self.window - 1, -1, -1, device=x.device)
        seen = ages <= cache.lengths.to(x.device)[:, None, None, None]  # [B, 1, 1, window]
        attended = nn.functional.scaled_dot_product_attention(
            self._split(query[:, None]), self._split(keys).to(query.dtype), self._split(values).to(query.dtype), seen
        )
        return self.output(attended.flatten(1))  # type: ignore[no-any-return]

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """As `Mixer.new_cache`: keys and values of the window."""
        if not self.is_causal:
            refuse_cache("window attention")
        empty = torch.zeros(batch, self.window, self.width, device=device, dtype=dtype)
        return MixerCache(torch.zeros(batch, dtype=torch.int64), {"keys": empty, "values": empty.clone()})

    def _split(self, x: Tensor) -> Tensor:
        """[N, S, D] to [N, H, S, D / H]."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _band(self, tokens: int, size: int, device: torch.device) -> Tensor:
        """[J, 1, S, keys] bool: in the window and in the sequence; or the token itself, so that no row is empty."""
        blocks = -(-tokens // size)
        starts = torch.arange(blocks, device=device)[:, None, None, None] * size
        queries = starts + torch.arange(size, device=device)[:, None]
        keys = starts - size + torch.arange(2 * size + self.after, device=device)
        seen = (queries - keys <= self.before) & (keys - queries <= self.after) & (keys >= 0) & (keys < tokens)
        return seen | (keys == queries)
