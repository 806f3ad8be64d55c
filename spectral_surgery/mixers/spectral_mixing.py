"""SpectralMixing: one learned complex filter for each channel.

Source: the idea of SpectralMixingLayer in FFT-Tensor; here all frequencies take part, the start is the identity, and a
filter keeps its meaning when the length changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectral_surgery.causal_conv import causal_fft_conv, causal_fft_conv_step
from spectral_surgery.mixers.base import MixerMethod, refuse_cache, require_range
from spectral_surgery.mixers.cache import MixerCache, last_tokens
from spectral_surgery.mixers.components import interpolate
from spectral_surgery.mixers.filtered import filtered
from spectral_surgery.mixers.layout import transpose_tokens
from spectral_surgery.mixers.run import run_bidirectional, run_causal
from spectral_surgery.mixers.slabs import channel_slabs, in_slabs
from spectral_surgery.transforms.base import as_real


@dataclass(frozen=True)
class SpectralMixingConfig:
    """Settings of SpectralMixing."""

    bins: int = field(
        default=129, metadata={"help": "Frequencies at which the filter is learned; n reach about n tokens either way."}
    )


@dataclass(frozen=True)
class CausalSpectralMixingConfig:
    """Settings of the causal SpectralMixing."""

    kernel_length: int = field(default=256, metadata={"help": "Tokens an output sees, itself included."})


class SpectralMixing(nn.Module):
    """A circular convolution over time; the identity at the start."""

    is_causal = False

    def __init__(self, config: SpectralMixingConfig, width: int) -> None:
        super().__init__()
        require_range("bins", config.bins, 2)
        self.width = width
        self.filter = nn.Parameter(_all_pass(config.bins, width))

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_bidirectional(self.mix, self.width, x, mask, cache)

    def mix(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D] float32."""
        tokens = as_real(x)

        def amplify(spectrum: Tensor, channels: slice, values: Tensor) -> Tensor:
            return spectrum * torch.view_as_complex(interpolate(values[channels], x.shape[1], dim=1)).T

        return filtered(amplify, channel_slabs(tokens), tokens, as_real(self.filter))

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:  # noqa: ARG002 - as every mixer
        """It cannot decode. Raises CausalityError always."""
        refuse_cache("spectral_mixing")


class CausalSpectralMixing(nn.Module):
    """A causal convolution whose kernel is learned as its spectrum; the identity at the start."""

    is_causal = True

    def __init__(self, config: CausalSpectralMixingConfig, width: int) -> None:
        super().__init__()
        require_range("kernel_length", config.kernel_length, 1)
        self.width, self.kernel_length = width, config.kernel_length
        self.filter = nn.Parameter(_all_pass(config.kernel_length // 2 + 1, width))

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_causal(self, x, mask, cache)

    def kernel(self) -> Tensor:
        """[D, L] float32: entry s weighs the token s places back."""
        kernel: Tensor = torch.fft.irfft(torch.view_as_complex(as_real(self.filter)), n=self.kernel_length)
        return kernel

    def mix(self, x: Tensor, lengths: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `CausalCore.mix`; [B, T, D] float32."""
        if cache is not None:
            cache.states["inputs"] = last_tokens(x, lengths, self.kernel_length)
        tokens, kernel = as_real(x), self.kernel()

        def mixed(channels: slice) -> Tensor:
            signals = transpose_tokens(tokens[..., channels]).transpose(0, 1)  # [n, B, T]
            return transpose_tokens(causal_fft_conv(signals, kernel[channels]).transpose(0, 1))

        return in_slabs(mixed, channel_slabs(tokens), tokens, 2)

    def step(self, x: Tensor, cache: MixerCache) -> Tensor:
        """As `CausalCore.step`; [B, D] float32."""
        history = cache.push("inputs", x).transpose(1, 2).unsqueeze(-1)  # [B, D, L, 1]
        return causal_fft_conv_step(history, cache.shared["kernel"]).squeeze(-1)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """As `Mixer.new_cache`: the last L tokens, and the kernel as it is now."""
        inputs = torch.zeros(batch, self.kernel_length, self.width, device=device, dtype=dtype)
        lengths = torch.zeros(batch, dtype=torch.int64)
        return MixerCache(lengths, {"inputs": inputs}, {"kernel": self.kernel().to(device)})


def _all_pass(bins: int, width: int) -> Tensor:
    """[D, bins, 2]: real part 1, imaginary part 0."""
    return torch.tensor([1.0, 0.0]).repeat(width, bins, 1)


SPECTRAL_MIXING = MixerMethod(
    name="spectral_mixing",
    config=SpectralMixingConfig,
    build=SpectralMixing,
    is_causal=False,
    counterpart="causal_spectral_mixing",
    source="SpectralMixingLayer of FFT-Tensor, corrected",
)
CAUSAL_SPECTRAL_MIXING = MixerMethod(
    name="causal_spectral_mixing",
    config=CausalSpectralMixingConfig,
    build=CausalSpectralMixing,
    is_causal=True,
    counterpart="spectral_mixing",
    source="long convolution, as in Hyena, arXiv 2302.10866",
)
