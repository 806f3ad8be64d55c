"""A mixer between two linear maps, as attention stands between its value and output projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ShapeError
from spectral_surgery.mixers.base import Mixer, require_tokens
from spectral_surgery.mixers.cache import MixerCache


class ProjectedMixer(nn.Module):
    """output(mixer(value(x))): with a mixer that starts as the identity, attention of every token to itself only."""

    def __init__(self, value: nn.Linear, mixer: Mixer, output: nn.Linear) -> None:
        super().__init__()
        if not value.out_features == mixer.width == output.in_features:
            raise ShapeError(
                f"projected mixer: expected one width of value, mixer and output, got {value.out_features},"
                f" {mixer.width}, {output.in_features}."
            )
        self.value, self.mixer, self.output = value, mixer, output
        self.width, self.is_causal = value.in_features, mixer.is_causal

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        require_tokens(x, self.width, mask)
        y: Tensor = self.output(self.mixer(self.value(x), mask, cache))
        return y if mask is None else torch.where(mask.bool()[..., None], y, 0)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """As `Mixer.new_cache`: the cache of the mixer."""
        return self.mixer.new_cache(batch, device, dtype)
