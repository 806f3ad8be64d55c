"""HybridSpectralAttention: far tokens by a spectral mixer, near ones by attention within a window.

Source: the module of that name in FFT-Tensor, whose window was not used; here it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectral_surgery.errors import CausalityError
from spectral_surgery.mixers.base import Mixer, MixerMethod, refuse_cache
from spectral_surgery.mixers.cache import MixerCache
from spectral_surgery.mixers.spectral_mixing import (
    CausalSpectralMixing,
    CausalSpectralMixingConfig,
    SpectralMixing,
    SpectralMixingConfig,
)
from spectral_surgery.mixers.window_attention import WindowAttention

_HEADS = {"help": "Heads of the attention."}


@dataclass(frozen=True)
class HybridConfig:
    """Settings of HybridSpectralAttention."""

    heads: int = field(default=4, metadata=_HEADS)
    window: int = field(default=64, metadata={"help": "Attention sees half of it on either side of a token."})
    bins: int = field(default=129, metadata={"help": "As of spectral_mixing."})


@dataclass(frozen=True)
class CausalHybridConfig:
    """Settings of the causal HybridSpectralAttention."""

    heads: int = field(default=4, metadata=_HEADS)
    window: int = field(default=64, metadata={"help": "Newest tokens that attention sees, the last one included."})
    kernel_length: int = field(default=256, metadata={"help": "As of causal_spectral_mixing."})


class HybridSpectralAttention(nn.Module):
    """attention(LayerNorm(x + spectral(x)))."""

    def __init__(self, spectral: Mixer, attention: WindowAttention) -> None:
        """Put two mixers in a row.

        Args:
            attention: for the near ones, of the same width and direction.

        Raises:
            CausalityError: when one is causal and the other is not.
        """
        super().__init__()
        if spectral.is_causal != attention.is_causal:
            raise CausalityError(
                f"hybrid: expected both parts causal or neither, got spectral part causal: {spectral.is_causal},"
                f" attention causal: {attention.is_causal}."
            )
        self.width, self.is_causal = attention.width, attention.is_causal
        self.spectral, self.attention = spectral, attention
        self.norm = nn.LayerNorm(self.width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        far, near = (None, None) if cache is None else (cache.parts["spectral"], cache.parts["attention"])
        mixed = self.norm(x + self.spectral(x, mask, far))
        y: Tensor = self.attention(mixed, mask, near)
        if cache is not None and near is not None:
            cache.lengths = near.lengths
        return y

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """As `Mixer.new_cache`: the caches of both parts."""
        if not self.is_causal:
            refuse_cache("hybrid")
        parts = {
            "spectral": self.spectral.new_cache(batch, device, dtype),
            "attention": self.attention.new_cache(batch, device, dtype),
        }
        return MixerCache(torch.zeros(batch, dtype=torch.int64), parts=parts)


def _hybrid(config: HybridConfig, width: int) -> HybridSpectralAttention:
    attention = WindowAttention(width, config.heads, config.window, is_causal=False)
    return HybridSpectralAttention(SpectralMixing(SpectralMixingConfig(config.bins), width), attention)


def _causal_hybrid(config: CausalHybridConfig, width: int) -> HybridSpectralAttention:
    spectral = CausalSpectralMixing(CausalSpectralMixingConfig(config.kernel_length), width)
    return HybridSpectralAttention(spectral, WindowAttention(width, config.heads, config.window, is_causal=True))


HYBRID = MixerMethod(
    name="hybrid",
    config=HybridConfig,
    build=_hybrid,
    is_causal=False,
    counterpart="causal_hybrid",
    source="HybridSpectralAttention of FFT-Tensor, with the window",
)
CAUSAL_HYBRID = MixerMethod(
    name="causal_hybrid",
    config=CausalHybridConfig,
    build=_causal_hybrid,
    is_causal=True,
    counterpart="hybrid",
    source="HybridSpectralAttention of FFT-Tensor, with the window, made causal",
)
