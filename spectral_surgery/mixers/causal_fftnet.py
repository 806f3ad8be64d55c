"""FFTNet from left to right: gains that depend on past chunks only become the kernel of a causal convolution.

Source: gate and kernel as in SPECTRE, arXiv 2502.18394 v7, whose kernel wraps round and whose gate sees all tokens;
here the kernel is cut to the past and the gate of a chunk pools the tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectral_surgery.causal_conv import causal_fft_conv, causal_fft_conv_step
from spectral_surgery.mixers.base import MixerMethod, require_range
from spectral_surgery.mixers.cache import MixerCache, last_tokens
from spectral_surgery.mixers.components import AdaptiveSpectralFilter, ModReLU
from spectral_surgery.mixers.layout import transpose_tokens
from spectral_surgery.mixers.run import run_causal
from spectral_surgery.mixers.slabs import channel_slabs, in_slabs
from spectral_surgery.transforms.base import as_real


@dataclass(frozen=True)
class CausalFFTNetMixerConfig:
    """Settings of the causal FFTNet; with init_std and modrelu_bias 0 it starts as the identity."""

    heads: int = field(default=4, metadata={"help": "Groups of channels that share their gains."})
    kernel_length: int = field(default=256, metadata={"help": "Tokens an output sees, itself included."})
    chunk: int = field(default=128, metadata={"help": "Tokens after which the gains adapt to what has been seen."})
    mlp_hidden_dim: int = field(default=64, metadata={"help": "Width of the MLP that makes gains of the mean token."})
    modrelu_bias: float = field(default=-0.1, metadata={"help": "Start of the modReLU bias; 0 changes nothing."})
    init_std: float = field(default=0.02, metadata={"help": "Spread of the gains around 1 at the start."})


class CausalFFTNetMixer(nn.Module):
    """y[t] = sum over s < L of h_j[s] x[t - s]; h_j, the kernel of t's chunk, comes from the mean of earlier chunks."""

    is_causal = True

    def __init__(self, config: CausalFFTNetMixerConfig, width: int) -> None:
        super().__init__()
        require_range("kernel_length", config.kernel_length, 2)
        require_range("chunk", config.chunk, 1)
        bins = config.kernel_length // 2 + 1
        self.width, self.kernel_length, self.chunk = width, config.kernel_length, config.chunk
        self.filter = AdaptiveSpectralFilter(width, config.heads, bins, config.mlp_hidden_dim, config.init_std)
        self.activation = ModReLU(config.heads, bins, config.modrelu_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `Mixer.__call__`."""
        return run_causal(self, x, mask, cache)

    def kernel(self, context: Tensor) -> Tensor:
        """Kernels of pooled tokens: [..., H, L] float32; gain 1 gives 1, 0, 0, ...

        ``context``: [..., D] mean of the tokens before a chunk; zeros for the first.
        """
        gain = self.activation(self.filter.gain(context, self.kernel_length), self.kernel_length)  # [..., F, H]
        kernel: Tensor = torch.fft.irfft(gain, n=self.kernel_length, dim=-2).transpose(-1, -2)
        return kernel

    def mix(self, x: Tensor, lengths: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """As `CausalCore.mix`; [B, T, D] float32."""
        tokens = as_real(x)
        kernels = self.kernel(self._contexts(tokens)).transpose(1, 2)  # [B, H, J, L]
        if cache is not None:
            self._fill(cache, x, kernels, lengths)
        group = self.width // self.filter.heads

        def mixed(channels: slice) -> Tensor:
            heads = slice(channels.start // group, -(-channels.stop // group))
            signals = transpose_tokens(tokens[..., channels]).reshape(len(x), heads.stop - heads.start, -1, x.shape[1])
            return transpose_tokens(causal_fft_conv(signals, kernels[:, heads], self.chunk).flatten(1, 2))

        by_heads = channel_slabs(tokens, group, split=False)  # or kernels would be laid out anew for every part
        return in_slabs(mixed, by_heads, tokens, 2)

    def step(self, x: Tensor, cache: MixerCache) -> Tensor:
        """As `CausalCore.step`; [B, D] float32."""
        starting = cache.lengths % self.chunk == 0
        if bool(starting.any()):
            seen = cache.lengths.clamp_min(1).to(x.device)[:, None]
            kernel = self.kernel(cache.states["total"] / seen)
            cache.states["kernel"] = torch.where(
                starting.to(x.device)[:, None, None], kernel.to(cache.states["kernel"].dtype), cache.states["kernel"]
            )
        cache.states["total"] = cache.states["total"] + x
        history = cache.push("inputs", x)  # [B, L, D]
        of_heads = history.reshape(*history.shape[:2], self.filter.heads, -1).transpose(1, 2)  # [B, H, L, D / H]
        return causal_fft_conv_step(of_heads, cache.states["kernel"]).flatten(1)

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """As `Mixer.new_cache`: the last L tokens, the sum of all, and the kernel of the chunk."""
        accumulated = torch.promote_types(dtype, torch.float32)
        states = {
            "inputs": torch.zeros(batch, self.kernel_length, self.width, device=device, dtype=dtype),
            "total": torch.zeros(batch, self.width, device=device, dtype=accumulated),
            "kernel": torch.zeros(batch, self.filter.heads, self.kernel_length, device=device, dtype=accumulated),
        }
        return MixerCache(torch.zeros(batch, dtype=torch.int64), states)

    def _contexts(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, J, D], the mean of the tokens before each chunk."""
        closed = (x.shape[1] - 1) // self.chunk
        chunks = x[:, : closed * self.chunk].reshape(len(x), closed, self.chunk, self.width)
        sums = chunks.sum(2).cumsum(1)  # [B, J - 1, D]
        counts = torch.arange(1, closed + 1, device=x.device) * self.chunk
        return torch.cat((torch.zeros_like(x[:, :1]), sums / counts[:, None]), 1)

    def _fill(self, cache: MixerCache, x: Tensor, kernels: Tensor, lengths: Tensor | None) -> None:
        places = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        last = ((places - 1).clamp_min(0) // self.chunk).to(x.device)
        cache.states["inputs"] = last_tokens(x, lengths, self.kernel_length)
        cache.states["total"] = as_real(x).sum(1)  # padding is zero
        cache.states["kernel"] = kernels[torch.arange(len(x), device=x.device), :, last]


CAUSAL_FFTNET = MixerMethod(
    name="causal_fftnet",
    config=CausalFFTNetMixerConfig,
    build=CausalFFTNetMixer,
    is_causal=True,
    counterpart="fftnet",
    source="FFTNet, arXiv 2502.18394, gate of v7, made causal",
)
