"""Fourier sums over tokens and channels: of all tokens, and of the last ones only.

Half of either follows from the symmetry of the spectrum of real numbers over channels. Both are self-adjoint,
the second one with time reversed, so that nothing is kept for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.causal_conv import causal_fft_conv
from spectral_surgery.mixers.layout import transpose_tokens
from spectral_surgery.mixers.slabs import channel_slabs, token_slabs

_BLOCK = 64  # tokens that are made together: of as many, and of the period before them
_PRODUCTS = 512  # periods up to it are multiplied out; the matrices of longer ones would take more than they save


def fourier_mix(x: Tensor) -> Tensor:
    """Re of the orthonormal two-dimensional transform of [T, D]. Returns a tensor like x.

    ``x`` is [B, T, D] float32 or float64.
    """
    y: Tensor = _FourierMix.apply(x)
    return y


def causal_fourier_mix(x: Tensor, period: int) -> Tensor:
    """y[t] = Re sum of x̂[m] e^(-2πi t m / L) / √L over m from t - L + 1 to t, x̂ the transform over channels.

    Short periods are matrix products over blocks of tokens: a later token meets an exact zero, so it changes no bit of
    an earlier output. Long ones are convolutions, of which the same is true. ``x`` is [B, T, D]
    float32 or float64; the result is like x.
    """
    if period > _PRODUCTS:
        return _by_chirps(x, period)
    y: Tensor = _CausalFourierMix.apply(x, period)
    return y


def _by_chirps(x: Tensor, period: int) -> Tensor:
    """The causal sum as a convolution between two multiplications by e^(-πi t² / L), since 2 t m = t² + m² - (t - m)².

    Source: Bluestein's algorithm; for an even L.
    """
    width, spectrum = x.shape[2], torch.fft.rfft(x, norm="ortho")
    signals = transpose_tokens(torch.cat((spectrum.real, spectrum.imag), 2))  # [B, 2 K, T]
    cos, sin = _chirp(torch.arange(x.shape[1], device=x.device), period, x.dtype)  # of the sign -i
    across, up = _chirp(torch.arange(min(x.shape[1], period), device=x.device), period, x.dtype)
    chirped = torch.cat((signals * cos, signals * sin), 1)  # [B, 4 K, T]
    by_real, by_imaginary = (
        causal_fft_conv(chirped, kernel.expand(len(x), -1))
        for kernel in (across, -up)  # conjugate
    )
    (real_cos, real_sin), (imaginary_cos, imaginary_sin) = (pair.chunk(2, 1) for pair in (by_real, by_imaginary))
    real, imaginary = real_cos - imaginary_sin, imaginary_cos + real_sin  # of sums of real and of imaginary parts
    even = (real * cos - imaginary * sin).chunk(2, 1)[0]
    odd = (real * sin + imaginary * cos).chunk(2, 1)[1]
    return transpose_tokens(_whole(even, -odd, 1, width)) / math.sqrt(period)


def _chirp(places: Tensor, period: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of e^(-πi t² / L), of period L."""
    angle = ((places % period) ** 2 % (2 * period)).double() * (math.pi / period)
    return angle.cos().to(dtype), -angle.sin().to(dtype)


def _whole(even: Tensor, odd: Tensor, dim: int, width: int) -> Tensor:
    """Channels 0 to D - 1 of what the real and the imaginary part of channel k give; those of D - k differ in sign."""
    mirrored = (even - odd).narrow(dim, 1, (width + 1) // 2 - 1).flip(dim)
    return torch.cat((even + odd, mirrored), dim)


class _FourierMix(torch.autograd.Function):
    """[B, T, D] to [B, T, D], symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - nothing is kept
        """Transform over channels, then over tokens.

        The real part of a transform is the transform of the part of its input that is self-conjugate when reversed;
        half of that is known from the other half.
        """
        batch, length, width = x.shape
        y = x.new_empty(x.shape)
        if not y.numel():
            return y
        spectrum = x.new_empty(batch, width // 2 + 1, length // 2 + 1, dtype=x.dtype.to_complex())
        for run in token_slabs(x, length // 2 + 1):
            reversed_run = x[:, length - run.stop + 1 : length - max(run.start, 1) + 1].flip(1)
            if run.start == 0:
                reversed_run = torch.cat((x[:, :1], reversed_run), 1)
            conjugate = torch.fft.rfft(reversed_run, norm="ortho").conj()
            spectrum[..., run] = transpose_tokens((torch.fft.rfft(x[:, run], norm="ortho") + conjugate) / 2)
        for run in channel_slabs(y[..., : width // 2 + 1]):
            tokens = transpose_tokens(torch.fft.hfft(spectrum[:, run], n=length, norm="ortho"))
            y[..., run] = tokens
            _mirror(y, tokens, run)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004 - torch gives a context
        """The same map."""
        return fourier_mix(grad)


def _mirror(y: Tensor, tokens: Tensor, run: slice) -> None:
    """Put channels k [B, T, n] of a run at D - k, where they are the same with time reversed."""
    width = y.shape[2]
    first, last = max(run.start, 1), min(run.stop, (width + 1) // 2)
    if first < last:
        known = tokens[..., first - run.start : last - run.start].flip(2)
        there = y[..., width - last + 1 : width - first + 1]
        there[:, :1] = known[:, :1]
        there[:, 1:] = known[:, 1:].flip(1)


class _CausalFourierMix(torch.autograd.Function):
    """[B, T, D] to [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, period: int) -> Tensor:
        """Fill the output some tokens at a time."""
        ctx.period = period
        y = x.new_empty(x.shape)
        with torch.autocast(x.device.type, enabled=False):
            matrices = _matrices(period, x)
            for run in token_slabs(x, x.shape[1], multiple=period):
                context = x[:, max(run.start - period, 0) : run.stop]
                y[:, run] = _mixed(context, matrices, run.stop - run.start)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The same map in reversed time, where token 0 has to be a multiple of the period."""
        missing = (1 - grad.shape[1]) % ctx.period
        back = torch.nn.functional.pad(grad, (0, 0, 0, missing)).flip(1)
        return causal_fourier_mix(back, ctx.period).flip(1)[:, : grad.shape[1]], None


def _matrices(period: int, like: Tensor) -> Tensor:
    """Cosines and sines [2, R, s, L + s]: from the L tokens before a block and its s, for R blocks of a period."""
    size = next(size for size in range(min(_BLOCK, period), 0, -1) if period % size == 0)
    if size < min(_BLOCK, period) // 4:
        size = period
    places = torch.arange(period, device=like.device).reshape(-1, size, 1)
    seen = places[:, :1] - period + torch.arange(period + size, device=like.device)
    angles = torch.arange(period, device=like.device, dtype=torch.float64) * (2 * math.pi / period)
    waves = torch.stack((angles.cos(), angles.sin())).to(like.dtype) / math.sqrt(period)
    there = (seen <= places) & (seen > places - period)
    return torch.where(there, waves[:, places * seen % period], 0)


def _mixed(x: Tensor, matrices: Tensor, count: int) -> Tensor:
    """The last tokens [B, count, D] of x, the first of them at a multiple of the period."""
    size, reach = matrices.shape[2:]
    spectrum = torch.fft.rfft(x, norm="ortho")
    padding = (0, 0, reach - size - (x.shape[1] - count), -count % size)
    sums = [
        _sums(torch.nn.functional.pad(part, padding), matrix)
        for part, matrix in zip((spectrum.real, spectrum.imag), matrices, strict=True)
    ]
    even, odd = (total[:, :count] for total in sums)
    return _whole(even, odd, 2, x.shape[2])


def _sums(tokens: Tensor, matrices: Tensor) -> Tensor:
    """[B, L + J s, K] and [R, s, L + s] to [B, J s, K]; block j takes matrix j mod R."""
    every, size, reach = matrices.shape
    blocks = (tokens.shape[1] - reach) // size + 1
    y = tokens.new_empty(len(tokens), blocks, size, tokens.shape[2])
    for out, sequence in zip(y, tokens, strict=True):
        windows = sequence.unfold(0, reach, size).mT  # [J, L + s, K], overlapping
        for first in range(min(every, blocks)):
            part = windows[first::every]
            out[first::every] = torch.bmm(matrices[first].expand(len(part), -1, -1), part)
    return y.flatten(1, 2)
