"""FNet: mixing without parameters, by a Fourier transform over tokens and channels.

Source: arXiv 2105.03824, section 3.2; here orthonormal, so that magnitudes are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError
from spectral_surgery.mixers.base import MixerMethod, refuse_cache, require_range, wide
from spectral_surgery.mixers.cache import MixerCache, last_tokens
from spectral_surgery.mixers.layout import swap
from spectral_surgery.mixers.run import run_bidirectional, run_causal
from spectral_surgery.mixers.slabs import in_slabs
from spectral_surgery.ops.causal_fft_conv import causal_fft_conv, causal_fft_conv_step


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
        """Nothing to learn."""
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_bidirectional(self.mix, self.width, x, mask, cache)

    def mix(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D] float32."""
        y: Tensor = _FourierMix.apply(wide(x))
        return y

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:  # noqa: ARG002
        """FNet cannot decode.

        Raises:
            CausalityError: always.
        """
        refuse_cache("fnet")


class _FourierMix(torch.autograd.Function):
    """Re of the two-dimensional transform, which is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - nothing is kept
        """[B, T, D] to [B, T, D]; half of it follows from the symmetry of the spectrum of real numbers."""
        spectrum = swap(torch.fft.rfft(x, norm="ortho"))  # [B, D // 2 + 1, T]
        half = in_slabs(lambda part: torch.fft.fft(part, norm="ortho").real, (spectrum,), (1,))
        known, mirrored = half.shape[1], half[:, 1 : (x.shape[2] + 1) // 2].flip(1)
        y = half.new_empty(len(x), x.shape[2], x.shape[1])
        y[:, :known] = half
        y[:, known:, :1] = mirrored[..., :1]
        y[:, known:, 1:] = mirrored[..., 1:].flip(2)
        return swap(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        """The same map."""
        y: Tensor = _FourierMix.apply(grad)
        return y


class CausalFNetMixer(nn.Module):
    """FNet's sum over the last L tokens only: y[t] = Re sum of x̂[m] e^(-2πi t m / L), m from t - L + 1 to t.

    Up to L tokens this is the Fourier matrix with everything above the diagonal struck out. Since
    2 t m = t² + m² - (t - m)², it is a causal convolution between two multiplications by e^(-πi t² / L) (Bluestein).
    """

    is_causal = True

    def __init__(self, config: CausalFNetMixerConfig, width: int) -> None:
        """Nothing to learn.

        Raises:
            ConfigError: when kernel_length is not positive and even.
        """
        super().__init__()
        require_range("kernel_length", config.kernel_length, 2)
        if config.kernel_length % 2:
            raise ConfigError(f"kernel_length {config.kernel_length}: even lengths are accepted.")
        self.width, self.kernel_length = width, config.kernel_length

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_causal(self, x, mask, cache)

    def mix(self, x: Tensor, lengths: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `CausalCore.mix`; [B, T, D] float32."""
        if cache is not None:
            cache.states["inputs"] = last_tokens(x, lengths, self.kernel_length)
        signals = swap(wide(x))  # [B, D, T]
        cos, sin = self._chirp(torch.arange(x.shape[1], device=x.device), signals.dtype)  # of the sign -i
        near = torch.arange(min(x.shape[1], self.kernel_length), device=x.device)
        across, up = self._chirp(near, signals.dtype)
        kernels = torch.stack((across, -up)) / math.sqrt(self.kernel_length)  # [2, L], conjugate
        chirped = torch.cat((signals * cos, signals * sin), 1)  # [B, 2 D, T]
        by_real, by_imaginary = (
            causal_fft_conv(chirped.flatten(0, 1), kernel).reshape(chirped.shape) for kernel in kernels
        )
        real = by_real[:, : self.width] - by_imaginary[:, self.width :]
        imaginary = by_imaginary[:, : self.width] + by_real[:, self.width :]
        mixed = torch.complex(real * cos - imaginary * sin, real * sin + imaginary * cos)
        y: Tensor = torch.fft.fft(mixed, dim=1, norm="ortho").real
        return swap(y)

    def step(self, x: Tensor, cache: MixerCache) -> Tensor:
        """As `CausalCore.step`; [B, D] float32."""
        history = wide(cache.push("inputs", x))  # [B, L, D]
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

    def _chirp(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Real and imaginary part of e^(-πi t² / L), of period L."""
        turn = (places % self.kernel_length) ** 2 % (2 * self.kernel_length)
        angle = turn.double() * (math.pi / self.kernel_length)
        return angle.cos().to(dtype), -angle.sin().to(dtype)


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
