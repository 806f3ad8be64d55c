"""FFTNet: filter the spectrum of a sequence by gains that depend on the sequence, then modReLU.

Source: arXiv 2502.18394 v1 to v5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectral_surgery.mixers.base import MixerMethod, refuse_cache
from spectral_surgery.mixers.cache import MixerCache
from spectral_surgery.mixers.components import AdaptiveSpectralFilter, ModReLU, amplify, modrelu
from spectral_surgery.mixers.filtered import filtered
from spectral_surgery.mixers.run import run_bidirectional
from spectral_surgery.mixers.slabs import channel_slabs
from spectral_surgery.transforms.base import as_real


@dataclass(frozen=True)
class FFTNetMixerConfig:
    """Settings of FFTNet; with init_std and modrelu_bias 0 it starts as the identity."""

    heads: int = field(default=4, metadata={"help": "Groups of channels that share their gains."})
    bins: int = field(
        default=129, metadata={"help": "Frequencies at which gains are learned; n reach about n tokens either way."}
    )
    mlp_hidden_dim: int = field(default=64, metadata={"help": "Width of the MLP that makes gains of the mean token."})
    modrelu_bias: float = field(default=-0.1, metadata={"help": "Start of the modReLU bias; 0 changes nothing."})
    init_std: float = field(default=0.02, metadata={"help": "Spread of the gains around 1 at the start."})


class FFTNetMixer(nn.Module):
    """Transform, adaptive filter, modReLU, inverse."""

    is_causal = False

    def __init__(self, config: FFTNetMixerConfig, width: int) -> None:
        super().__init__()
        self.width = width
        self.filter = AdaptiveSpectralFilter(width, config.heads, config.bins, config.mlp_hidden_dim, config.init_std)
        self.activation = ModReLU(config.heads, config.bins, config.modrelu_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_bidirectional(self.mix, self.width, x, mask, cache)

    def mix(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D] float32."""
        length, tokens = x.shape[1], as_real(x)
        gain, bias = self.filter.gain(tokens.mean(1), length), self.activation.of_length(length)
        group = self.width // self.filter.heads

        def mix(spectrum: Tensor, channels: slice, gain: Tensor, bias: Tensor) -> Tensor:
            heads = slice(channels.start // group, -(-channels.stop // group))
            return modrelu(amplify(spectrum, gain[..., heads]), bias[:, heads])

        return filtered(mix, channel_slabs(tokens, group), tokens, gain, bias)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:  # noqa: ARG002 - as every mixer
        """It cannot decode. Raises CausalityError always."""
        refuse_cache("fftnet")


FFTNET = MixerMethod(
    name="fftnet",
    config=FFTNetMixerConfig,
    build=FFTNetMixer,
    is_causal=False,
    counterpart="causal_fftnet",
    source="FFTNet, arXiv 2502.18394 v1-v5",
)
