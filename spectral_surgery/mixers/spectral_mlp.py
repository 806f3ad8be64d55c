"""SpectralMLPBlock: a whole transformer block with a mixer where attention was.

Source: the module of that name in FFT-Tensor; the shape is that of pre-norm transformers and of MLP-Mixer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectral_surgery.mixers.base import Mixer, MixerMethod, require_range, require_tokens
from spectral_surgery.mixers.cache import MixerCache
from spectral_surgery.mixers.slabs import in_slabs, token_slabs
from spectral_surgery.mixers.spectral_mixing import (
    CausalSpectralMixing,
    CausalSpectralMixingConfig,
    SpectralMixing,
    SpectralMixingConfig,
)

_RATIO = {"help": "Hidden width of the MLP in widths of the model."}
_DROPOUT = {"help": "Probability of dropping an entry of a residual in training."}


@dataclass(frozen=True)
class SpectralMLPConfig:
    """Settings of SpectralMLPBlock."""

    bins: int = field(default=129, metadata={"help": "As of spectral_mixing."})
    mlp_ratio: float = field(default=4.0, metadata=_RATIO)
    dropout: float = field(default=0.1, metadata=_DROPOUT)


@dataclass(frozen=True)
class CausalSpectralMLPConfig:
    """Settings of the causal SpectralMLPBlock."""

    kernel_length: int = field(default=256, metadata={"help": "As of causal_spectral_mixing."})
    mlp_ratio: float = field(default=4.0, metadata=_RATIO)
    dropout: float = field(default=0.1, metadata=_DROPOUT)


class SpectralMLPBlock(nn.Module):
    """x + mixer(LayerNorm x), then x + MLP(LayerNorm x); residuals included, so it replaces a block, not attention."""

    def __init__(self, mixer: Mixer, mlp_ratio: float = 4.0, dropout: float = 0.1) -> None:
        """Put a block around a mixer.

        Args:
            mixer: any; causal or not, as the block will be.
            mlp_ratio: hidden width / D.
            dropout: probability.

        Raises:
            ConfigError: when a setting is out of range.
        """
        super().__init__()
        width = mixer.width
        require_range("mlp_ratio", mlp_ratio, 1 / width)
        require_range("dropout", dropout, 0, 1)
        self.width, self.is_causal, self.mixer = width, mixer.is_causal, mixer
        self.mixer_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        require_tokens(x, self.width, mask)
        mixed = self.mixer(self.mixer_norm(x), mask, cache)

        def fed(tokens: slice) -> Tensor:
            y = x[:, tokens] + self.dropout(mixed[:, tokens])
            return y + self.dropout(self.mlp(self.mlp_norm(y)))  # type: ignore[no-any-return]

        y = in_slabs(fed, token_slabs(x, x.shape[1]), mixed, 1)
        return y if mask is None else torch.where(mask.bool()[..., None], y, 0)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """As `Mixer.new_cache`: the cache of the mixer."""
        return self.mixer.new_cache(batch, device, dtype)


def _block(config: SpectralMLPConfig, width: int) -> SpectralMLPBlock:
    mixer = SpectralMixing(SpectralMixingConfig(config.bins), width)
    return SpectralMLPBlock(mixer, config.mlp_ratio, config.dropout)


def _causal_block(config: CausalSpectralMLPConfig, width: int) -> SpectralMLPBlock:
    mixer = CausalSpectralMixing(CausalSpectralMixingConfig(config.kernel_length), width)
    return SpectralMLPBlock(mixer, config.mlp_ratio, config.dropout)


SPECTRAL_MLP = MixerMethod(
    name="spectral_mlp",
    config=SpectralMLPConfig,
    build=_block,
    is_causal=False,
    counterpart="causal_spectral_mlp",
    source="SpectralMLPBlock of FFT-Tensor",
)
CAUSAL_SPECTRAL_MLP = MixerMethod(
    name="causal_spectral_mlp",
    config=CausalSpectralMLPConfig,
    build=_causal_block,
    is_causal=True,
    counterpart="spectral_mlp",
    source="SpectralMLPBlock of FFT-Tensor, made causal",
)
