"""A gate over the components of a low-rank map: which of them each token uses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError

_FORGET = 0.01  # least weight of the newest tokens in the statistics
_DYNAMIC = -1  # in frozen_mask: not frozen


class RankGate(nn.Module):
    """A mask of zeros and ones for each token, from that token alone, so that nothing leaks along time.

    A small network turns the magnitudes of the R components into probabilities p over them. A component is open where
    its share of their entropy, -p log p over its value at p = 1/R, exceeds a threshold. The gradient passes straight
    through the step as that of sigmoid(sharpness * (share - threshold)). A fresh gate is open for every token.

    Source: FouRA, arXiv 2406.08798, section 4 (entropy of a learned map of the low-rank features, then a step); the
    surrogate gradient is ours.

    Attributes:
        rate: [R] share of recent tokens that opened each component; observed in training mode.
        seen: [] int64, tokens observed.
        frozen_mask: [R] int8, -1 while the gate is dynamic, else the one mask of all tokens.
    """

    def __init__(self, rank: int, threshold: float, sharpness: float) -> None:
        """Open all components.

        Raises ConfigError when there is nothing to choose between, or a setting is out of range.
        """
        super().__init__()
        if rank < 2:
            raise ConfigError(f"use_gate: expected r of 2 or more, got {rank}: nothing to choose between.")
        if not 0 < threshold < 1:
            raise ConfigError(
                f"gate_threshold: expected above 0 and below 1, where a fresh gate is open, got {threshold:g}."
            )
        if not sharpness > 0:
            raise ConfigError(f"gate_sharpness: expected above 0, got {sharpness:g}.")
        self.threshold, self.sharpness = threshold, sharpness
        self.hidden = nn.Linear(rank, rank)
        self.logits = nn.Linear(rank, rank)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        self.rate: Tensor
        self.seen: Tensor
        self.frozen_mask: Tensor
        self.register_buffer("rate", torch.ones(rank))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frozen_mask", torch.full((rank,), _DYNAMIC, dtype=torch.int8))
        self.is_frozen = False
        self.register_load_state_dict_post_hook(_note_frozen)  # type: ignore[no-untyped-call]

    def forward(self, magnitudes: Tensor) -> Tensor:
        """The mask. Returns zeros and ones, [..., R] or, once frozen, [R]; in the dtype of the magnitudes.

        ``magnitudes`` is [..., R] of the components.
        """
        if self.is_frozen:
            return (self.frozen_mask > 0).to(magnitudes.dtype)
        features = nn.functional.silu(self.hidden(magnitudes.to(self.hidden.weight.dtype)))
        log_p: Tensor = self.logits(features).to(magnitudes.dtype).log_softmax(-1)
        uniform = math.log(log_p.shape[-1]) / log_p.shape[-1]
        share = -log_p.exp() * log_p / uniform  # [..., R]
        mask = (share > self.threshold).to(share.dtype)
        if self.training:
            self._observe(mask)
        soft = (self.sharpness * (share - self.threshold)).sigmoid()
        return mask + (soft - soft.detach())  # exactly the mask, with the gradient of soft

    def freeze(self) -> None:
        """Keep, for all tokens alike, the components that most tokens opened.

        Raises ConfigError when no tokens were observed.
        """
        if not self.is_frozen and not self.seen:
            raise ConfigError(
                "freeze_gate: expected a gate that has seen tokens, got none. Run the model in training mode first."
            )
        if not self.is_frozen:
            self.frozen_mask.copy_(self.rate > 0.5)
        self.is_frozen = True

    @torch.no_grad()
    def _observe(self, mask: Tensor) -> None:
        mask = mask.detach().reshape(-1, mask.shape[-1])
        if not len(mask):
            return
        self.seen.add_(len(mask))
        weight = (len(mask) / self.seen).clamp(min=_FORGET)  # an average that becomes a moving one
        self.rate.lerp_(mask.mean(0).to(self.rate.dtype), weight.to(self.rate.dtype))


def _note_frozen(gate: nn.Module, _: Any) -> None:
    if isinstance(gate, RankGate) and not gate.frozen_mask.is_meta:
        gate.is_frozen = bool((gate.frozen_mask != _DYNAMIC).any())
