"""What a causal mixer remembers between calls, so that a new token costs the same however many came before."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class MixerCache:
    """State of one mixer for a batch of sequences being continued.

    Attributes:
        lengths: [B] int64 on the CPU, tokens seen of each sequence.
        states: [B, ...] tensors by name.
        shared: tensors by name that are the same for all sequences.
        parts: caches of the mixers it is made of, by name.
    """

    lengths: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, MixerCache] = field(default_factory=dict)

    def select(self, rows: Tensor) -> MixerCache:
        """The cache of some sequences, or of sequences in another order, as beam search needs.

        ``rows`` is [N] int64, numbers of sequences.
        """
        return MixerCache(
            self.lengths[rows.to(self.lengths.device)],
            {name: state.index_select(0, rows.to(state.device)) for name, state in self.states.items()},
            dict(self.shared),
            {name: part.select(rows) for name, part in self.parts.items()},
        )

    def replace(self, other: MixerCache) -> None:
        """Become another cache: after ``cache.replace(cache.select(rows))`` the sequences are those of `rows`."""
        self.lengths, self.states, self.shared = other.lengths, other.states, other.shared
        self.parts = other.parts

    def write(self, rows: Tensor, part: MixerCache) -> None:
        """Put back what `select` took out. ``rows`` is [N] int64, all different."""
        self.lengths = self.lengths.index_copy(0, rows.to(self.lengths.device), part.lengths)
        for name, state in self.states.items():
            self.states[name] = state.index_copy(0, rows.to(state.device), part.states[name])

    def push(self, name: str, token: Tensor) -> Tensor:
        """Add the newest entry to a history, and drop the oldest. Returns the state, [B, L, ...].

        Args:
            name: of a state [B, L, ...], oldest first.
            token: [B, ...].
        """
        state = self.states[name]
        self.states[name] = torch.cat((state[:, 1:], token.unsqueeze(1).to(state.dtype)), 1)
        return self.states[name]


def last_tokens(x: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """The last tokens of each sequence, oldest first, zeros before the first: [B, count, ...].

    Args:
        x: [B, T, ...], each sequence from the left.
        lengths: [B] int64, tokens of each; None for T.
    """
    batch, tokens = x.shape[:2]
    if lengths is None:
        newest = x[:, -count:]
        return torch.cat((x.new_zeros(batch, count - newest.shape[1], *x.shape[2:]), newest), 1)
    places = lengths.to(x.device)[:, None] - count + torch.arange(count, device=x.device)  # [B, count]
    rows = torch.arange(batch, device=x.device)[:, None]
    found = x[rows, places.clamp(0, tokens - 1)]
    return torch.where((places >= 0).reshape(batch, count, *[1] * (x.ndim - 2)), found, 0)
