"""Causal linear convolution over time, bit-exactly causal, with kernels that may change from chunk to chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.errors import ShapeError
from spectral_surgery.ops.causal_fft_conv.windows import by_fft, by_products

__all__ = ["causal_fft_conv", "causal_fft_conv_step"]

PRODUCT_LAGS = 512  # kernels no longer than this are multiplied out; measured, see `bench mixers`
_PRODUCT_BLOCK = 32
_SLAB = 1 << 21  # entries worked on at once, so that temporaries stay small and are reused


def causal_fft_conv(x: Tensor, kernel: Tensor, chunk: int | None = None) -> Tensor:
    """y[n, t] = sum over s of kernel[j, s] x[n, t - s], with s from 0 to min(t, L - 1) and j = t // chunk.

    Changing x at t changes no bit of y before t: an FFT over all of time would spread rounding noise there, so it only
    carries whole blocks to later ones, zero-padded to twice their size.

    Args:
        x: [..., N, T] float, N signals that share their kernels.
        kernel: [..., L], or [..., J, L] with a chunk, J = ceil(T / chunk): kernel j makes the outputs of chunk j.
        chunk: tokens of a chunk; None for one kernel.

    Returns:
        [..., N, T] in the dtype of x, computed in float32 or, from float64, in float64.

    Raises:
        ShapeError: when there is no token or lag, or the kernel does not fit.
    """
    _check(x, kernel, chunk)
    length, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    kernels = (kernel.unsqueeze(-2) if chunk is None else kernel)[..., :length].to(dtype)  # [..., J, L]
    signals = x.reshape(-1, *x.shape[-2:])  # [G, N, T]
    with torch.autocast(x.device.type, enabled=False):
        y = _slabs(signals, kernels.reshape(-1, *kernels.shape[-2:]), chunk, dtype)
    return y.to(x.dtype).reshape(x.shape)


def causal_fft_conv_step(history: Tensor, kernel: Tensor) -> Tensor:
    """The output for the newest of the last L tokens: what `causal_fft_conv` gives for it, at O(L) an output.

    Args:
        history: [..., L, N], oldest first, zeros before the first token.
        kernel: [..., L]; leading dimensions broadcast with those of history.

    Returns:
        [..., N] in float32 or float64.
    """
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    with torch.autocast(history.device.type, enabled=False):
        return (kernel.flip(-1).unsqueeze(-2) @ history.to(kernel.dtype)).squeeze(-2)


def _slabs(x: Tensor, kernel: Tensor, chunk: int | None, dtype: torch.dtype) -> Tensor:
    """[G, N, T] and [G, J, L] to [G, N, T], a piece of the groups or of the signals at a time."""
    signals, length = x.shape[1:]
    share = max(1, _SLAB // (signals * length))
    part = signals if share > 1 else max(1, _SLAB // length)
    groups = [
        torch.cat([_convolve(piece.to(dtype), kernels, chunk) for piece in torch.split(group, part, 1)], 1)
        for group, kernels in zip(torch.split(x, share), torch.split(kernel, share), strict=True)
    ]
    return torch.cat(groups)


def _convolve(x: Tensor, kernel: Tensor, chunk: int | None) -> Tensor:
    length, lags = x.shape[-1], kernel.shape[-1]
    product = lags <= PRODUCT_LAGS
    size = min(length, chunk or (_PRODUCT_BLOCK if product else _power_of_two(lags)))
    chunks = -(-length // size)
    past = lags if chunks > 1 else 0
    padded = torch.nn.functional.pad(x, (past, chunks * size - length))
    windows = padded.unfold(-1, past + size, size)  # [G, N, J, past + size]
    blocks = by_products if product else by_fft
    if chunk is None:
        y = blocks(windows.flatten(1, 2), kernel[:, 0], size)  # [G, N J, size]
    else:
        by_chunk = windows.transpose(1, 2).flatten(0, 1)  # [G J, N, past + size]
        y = blocks(by_chunk, kernel.flatten(0, 1), size).reshape(len(x), chunks, -1, size).transpose(1, 2)
    return y.reshape(*x.shape[:2], chunks * size)[..., :length]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _check(x: Tensor, kernel: Tensor, chunk: int | None) -> None:
    if x.ndim < 2 or not x.numel() or not kernel.numel():
        raise ShapeError(
            f"causal_fft_conv: x {tuple(x.shape)}, kernel {tuple(kernel.shape)}; [..., N, T] and [..., L] with at least"
            " one token and one lag are accepted."
        )
    wanted = x.shape[:-2] if chunk is None else (*x.shape[:-2], -(-x.shape[-1] // chunk))
    if kernel.shape[:-1] != wanted:
        raise ShapeError(
            f"causal_fft_conv: kernel {tuple(kernel.shape)} for x {tuple(x.shape)} in chunks of {chunk};"
            f" {[*wanted, 'L']} is accepted."
        )
