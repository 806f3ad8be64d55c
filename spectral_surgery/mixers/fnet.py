"""FNet: mixing without parameters, by a Fourier transform over tokens and channels.

Source: arXiv 2105.03824, section 3.2; here orthonormal, so that magnitudes are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectral_surgery.causal_conv import causal_fft_conv_step
from spectral_surgery.errors import ConfigError
from spectral_surgery.mixers.base import MixerMethod, refuse_cache, require_range
from spectral_surgery.mixers.cache import MixerCache, last_tokens
from spectral_surgery.mixers.fourier_mix import causal_fourier_mix, fourier_mix
from spectral_surgery.mixers.run import run_bidirectional, run_causal
from spectral_surgery.transforms.base import as_real


@dataclass(frozen=True)
class FNetMixerConfig:
    """FNet has no settings."""


@dataclass(frozen=True)
class CausalFNetMixerConfig:
    """Settings of the causal FNet."""

    kernel_length: int = field(
        default=256, metadata={"help": "Tokens an output sees, and the period of the transform; even."}
    )


class FNetMixer(nn.Module):
    """Re of the two-dimensional transform of [T, D]."""

    is_causal = False

    def __init__(self, config: FNetMixerConfig, width: int) -> None:  # noqa: ARG002 - as every mixer
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_bidirectional(self.mix, self.width, x, mask, cache)

    def mix(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D] float32."""
        return fourier_mix(as_real(x))

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:  # noqa: ARG002 - as every mixer
        """FNet cannot decode. Raises CausalityError always."""
        refuse_cache("fnet")


class CausalFNetMixer(nn.Module):
    """FNet's sum over the last L tokens only: y[t] = Re sum of x̂[m] e^(-2πi t m / L), m from t - L + 1 to t.

    Up to L tokens this is the Fourier matrix with everything above the diagonal struck out.
    """

    is_causal = True

    def __init__(self, config: CausalFNetMixerConfig, width: int) -> None:
        super().__init__()
        require_range("kernel_length", config.kernel_length, 2)
        if config.kernel_length % 2:
            raise ConfigError(f"kernel_length {config.kernel_length}: expected even lengths.")
        self.width, self.kernel_length = width, config.kernel_length

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_causal(self, x, mask, cache)

    def mix(self, x: Tensor, lengths: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `CausalCore.mix`; [B, T, D] float32."""
        if cache is not None:
            cache.states["inputs"] = last_tokens(x, lengths, self.kernel_length)
        return causal_fourier_mix(as_real(x), self.kernel_length)

    def step(self, x: Tensor, cache: MixerCache) -> Tensor:
        """As `CausalCore.step`; [B, D] float32."""
        history = as_real(cache.push("inputs", x))  # [B, L, D]
        now = cache.lengths.to(x.device)[:, None]
        lags = torch.arange(self.kernel_length, device=x.device)
        turn = (now * (now - lags)) % self.kernel_length * (2 * math.pi / self.kernel_length)  # [B, L]
        waves = torch.stack((turn.cos(), -turn.sin()), 1).to(history.dtype) / math.sqrt(self.kernel_length)
        mixed = causal_fft_conv_step(history.unsqueeze(1), waves)  # [B, 2, D]
        y: Tensor = torch.fft.fft(torch.complex(mixed[:, 0], mixed[:, 1]), norm="ortho").real
        return y

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """As `Mixer.new_cache`: the last L tokens."""
        inputs = torch.zeros(batch, self.kernel_length, self.width, device=device, dtype=dtype)
        return MixerCache(torch.zeros(batch, dtype=torch.int64), {"inputs": inputs})


FNET = MixerMethod(
    name="fnet",
    config=FNetMixerConfig,
    build=FNetMixer,
    is_causal=False,
    counterpart="causal_fnet",
    source="FNet, arXiv 2105.03824",
)
CAUSAL_FNET = MixerMethod(
    name="causal_fnet",
    config=CausalFNetMixerConfig,
    build=CausalFNetMixer,
    is_causal=True,
    counterpart="fnet",
    source="FNet, arXiv 2105.03824, with the future struck out of the Fourier matrix",
)
