"""The parts of FFTNet, each usable alone: transform, adaptive filter, modReLU, inverse.

Spectra are complex [B, F, D], F = T // 2 + 1. What is learned over frequency is given at a few bins, evenly from zero
to the Nyquist frequency, and interpolated, so that it means the same at every T.

Source: FFTNet, arXiv 2502.18394 v1 to v5, equations of the adaptive spectral filter and of modReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ShapeError
from spectral_surgery.mixers.base import require_heads, require_range
from spectral_surgery.transforms.base import as_real

_SMALL = 1e-3  # magnitudes below it are treated as it, which bounds the gradient of modReLU


class FourierTransform(nn.Module):
    """Orthonormal real FFT over time."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform x [B, T, D], real: [B, T // 2 + 1, D] complex64 (complex128 from float64)."""
        spectrum: Tensor = torch.fft.rfft(as_real(x), dim=1, norm="ortho")
        return spectrum


class InverseFourierTransform(nn.Module):
    """Inverse of `FourierTransform`."""

    def forward(self, spectrum: Tensor, length: int) -> Tensor:
        """Go back to time; imaginary parts at zero and at the Nyquist frequency do not count.

        Returns [B, T, D] float32 or float64.

        Args:
            spectrum: [B, F, D] complex.
            length: T; F alone does not tell 2 F - 2 from 2 F - 1.
        """
        x: Tensor = torch.fft.irfft(spectrum, n=length, dim=1, norm="ortho")
        return x


class AdaptiveSpectralFilter(nn.Module):
    """A complex gain for each head and frequency: learned, plus what an MLP makes of the pooled tokens.

    The MLP ends in tanh, and in zeros at the start.
    """

    def __init__(self, width: int, heads: int, bins: int, hidden: int, init_std: float = 0.0) -> None:
        """Start at gain 1.

        Args:
            heads: H; the D / H channels of a head share their gains.
            init_std: standard deviation of real and imaginary part around 1 and 0 at the start.

        Raises:
            ConfigError: when a setting is out of range.
        """
        super().__init__()
        require_heads(heads, width)
        require_range("bins", bins, 2)
        require_range("mlp_hidden_dim", hidden, 1)
        require_range("init_std", init_std, 0)
        self.heads, self.bins = heads, bins
        self.filter = nn.Parameter(torch.randn(heads, bins, 2) * init_std + torch.tensor([1.0, 0.0]))
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, heads * bins * 2)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def gain(self, context: Tensor, length: int) -> Tensor:
        """Gains of the frequencies of a length: [..., T // 2 + 1, H] complex.

        ``context``: [..., D], tokens pooled; zeros give the gain of an unknown past.
        """
        hidden = nn.functional.gelu(self.up(self.norm(context.to(self.up.weight.dtype))))
        change = torch.tanh(as_real(self.down(hidden))).reshape(*context.shape[:-1], self.heads, self.bins, 2)
        gain = torch.view_as_complex(interpolate(as_real(self.filter) + change, length, dim=-2))  # [..., H, F]
        return gain.transpose(-1, -2)

    def forward(self, spectrum: Tensor, context: Tensor, length: int) -> Tensor:
        """Multiply a spectrum by its gains: [B, F, D] complex.

        ``spectrum`` is [B, F, D] complex; ``context`` is [B, D].
        """
        return amplify(spectrum, self.gain(context, length))


class ModReLU(nn.Module):
    """Shrink complex numbers by a learned amount and keep their phase: max(|z| + b, 0) z / |z|.

    Source: arXiv 1511.06464, equation 8.
    """

    def __init__(self, heads: int, bins: int, bias: float = -0.1) -> None:
        """Start with one bias everywhere; 0 changes nothing, exactly.

        Raises ConfigError when a setting is out of range.
        """
        super().__init__()
        require_range("heads", heads, 1)
        require_range("bins", bins, 2)
        self.bias = nn.Parameter(torch.full((heads, bins), float(bias)))

    def forward(self, z: Tensor, length: int) -> Tensor:
        """Apply it to a spectrum: like z. ``z`` is [..., F, D] complex, D a multiple of H."""
        return modrelu(z, self.of_length(length))

    def of_length(self, length: int) -> Tensor:
        """Biases [T // 2 + 1, H] of the frequencies of a length."""
        return interpolate(as_real(self.bias), length, dim=1).T


def amplify(spectrum: Tensor, gain: Tensor) -> Tensor:
    """Multiply the channels of each head by the gains of the head: [B, F, D] complex.

    ``spectrum`` is [B, F, D] complex; ``gain`` is [B, F, H] complex.
    """
    heads = spectrum.reshape(*spectrum.shape[:-1], gain.shape[-1], -1)
    return (heads * gain.unsqueeze(-1)).flatten(-2)


def modrelu(z: Tensor, bias: Tensor) -> Tensor:
    """max(|z| + b, 0) z / |z|, and b = 0 gives z itself. Returns a tensor like z.

    ``z`` is [..., F, D] complex, D a multiple of H; ``bias`` is [F, H].
    """
    heads = z.reshape(*z.shape[:-1], bias.shape[-1], -1)
    square = heads.real * heads.real + heads.imag * heads.imag
    return (heads * torch.relu(1 + bias.unsqueeze(-1) / square.clamp_min(_SMALL**2).sqrt())).flatten(-2)


def interpolate(values: Tensor, length: int, dim: int) -> Tensor:
    """Values at evenly spaced frequencies to values at the frequencies of a length, linearly.

    Returns [..., T // 2 + 1, ...], exact where a frequency is a bin. ``values`` is [..., bins, ...] real, from
    frequency zero to Nyquist.

    Raises ShapeError when there are fewer than 2 bins.
    """
    bins = values.shape[dim]
    if bins < 2:
        raise ShapeError(f"interpolate: expected at least 2 bins, got {bins}.")
    each, uneven = divmod(length, 2 * (bins - 1))
    trailing = [1] * (values.ndim - 1 - dim % values.ndim)
    if not uneven:  # the same shares between any two bins: several times faster
        dim %= values.ndim
        shares = (torch.arange(each, device=values.device, dtype=values.dtype) / each).reshape(-1, *trailing)
        low, high = (values.narrow(dim, start, bins - 1).unsqueeze(dim + 1) for start in (0, 1))
        inside = torch.lerp(low, high, shares).flatten(dim, dim + 1)
        return torch.cat((inside, values.narrow(dim, bins - 1, 1)), dim)
    scaled = torch.arange(length // 2 + 1, device=values.device) * (2 * (bins - 1))
    nearest = (scaled // length).clamp_max(bins - 2)
    share = ((scaled - nearest * length).to(values.dtype) / length).reshape(-1, *trailing)
    return torch.lerp(values.index_select(dim, nearest), values.index_select(dim, nearest + 1), share)
