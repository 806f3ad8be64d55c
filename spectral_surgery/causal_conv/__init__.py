"""Causal linear convolution over time, bit-exactly causal, with kernels that may change from chunk to chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.causal_conv.slabs import convolve
from spectral_surgery.errors import ShapeError

__all__ = ["causal_fft_conv", "causal_fft_conv_step"]


def causal_fft_conv(x: Tensor, kernel: Tensor, chunk: int | None = None) -> Tensor:
    """y[n, t] = sum over s of kernel[j, s] x[n, t - s], with s from 0 to min(t, L - 1) and j = t // chunk.

    Changing x at t changes no bit of y before t: an FFT over all of time would spread rounding noise there, so it only
    carries whole blocks to later ones, zero-padded to twice their size. Kernels too short to gain from an FFT are
    multiplied out. Memory beyond the output does not grow with T. Returns [..., N, T] in the dtype of x, computed in
    float32 or, from float64, in float64. Differentiable once.

    Args:
        x: [..., N, T] float, N signals that share their kernels.
        kernel: [..., L], or [..., J, L] with a chunk, J = ceil(T / chunk): kernel j makes the outputs of chunk j.

    Raises:
        ShapeError: when there is no token or lag, or the kernel does not fit.
    """
    _check(x, kernel, chunk)
    length, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    kernels = (kernel.unsqueeze(-2) if chunk is None else kernel)[..., :length]  # [..., J, L]
    signals = x.reshape(-1, *x.shape[-2:]).to(dtype)  # [G, N, T]
    y = convolve(signals, kernels.reshape(-1, *kernels.shape[-2:]).to(dtype), chunk)
    return y.to(x.dtype).reshape(x.shape)


def causal_fft_conv_step(history: Tensor, kernel: Tensor) -> Tensor:
    """The output for the newest of the last L tokens: what `causal_fft_conv` gives for it, at O(L) an output.

    Returns [..., N] in float32 or float64.

    Args:
        history: [..., L, N], oldest first, zeros before the first token.
        kernel: [..., L]; leading dimensions broadcast with those of history.
    """
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    with torch.autocast(history.device.type, enabled=False):
        return (kernel.flip(-1).unsqueeze(-2) @ history.to(kernel.dtype)).squeeze(-2)


def _check(x: Tensor, kernel: Tensor, chunk: int | None) -> None:
    if x.ndim < 2 or not x.numel() or not kernel.numel():
        raise ShapeError(
            "causal_fft_conv: expected x [..., N, T] and a kernel [..., L] with at least one token and one lag, got"
            f" {tuple(x.shape)} and {tuple(kernel.shape)}."
        )
    wanted = x.shape[:-2] if chunk is None else (*x.shape[:-2], -(-x.shape[-1] // chunk))
    if kernel.shape[:-1] != wanted:
        raise ShapeError(
            f"causal_fft_conv: expected a kernel of {[*wanted, 'L']} for x {tuple(x.shape)} in chunks of {chunk},"
            f" got {tuple(kernel.shape)}."
        )
