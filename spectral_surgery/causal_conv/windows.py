"""Outputs of a block of tokens from the tokens before and in it, by matrix products and by FFT.

Both take rows [K, M, past + size]: K kernels, M windows for each, the last `size` tokens being the block whose outputs
are wanted. An output never meets a later token: within a product a later token is multiplied by an exact zero, and an
FFT carries whole earlier blocks only. So the future does not reach the past even as rounding noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRODUCT_SIZE = 128  # blocks no longer than this are multiplied, longer ones halved


def by_products(rows: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Blocks by one matrix product: the fastest for short kernels, (past + size) multiply-adds an output.

    Returns [K, M, size]. ``rows`` is [K, M, past + size]; ``kernel`` is [K, L].
    """
    return torch.bmm(rows.contiguous(), toeplitz(kernel, rows.shape[-1], size).mT)


def by_fft(rows: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Blocks by FFT of what is before them, halving the block until products are cheaper: O(log² size) an output.

    Returns [K, M, size]. ``rows`` is [K, M, past + size]; ``kernel`` is [K, L].
    """
    past = rows.shape[-1] - size
    y = _within(rows[..., past:], kernel)
    return y + _from_left(rows[..., :past], kernel, size) if past else y


def toeplitz(kernel: Tensor, width: int, size: int) -> Tensor:
    """The matrix of a convolution on a window: entry (t, u) is kernel[width - size + t - u], zero outside the kernel.

    Returns [K, size, width]. ``kernel`` is [K, L].
    """
    lags = kernel.shape[-1]
    kernel = kernel[:, : min(lags, width)].flip(-1)
    before = width - kernel.shape[-1]
    padded = torch.nn.functional.pad(kernel, (before, size - 1))  # [K, width + size - 1]
    return padded.unfold(-1, width, 1).flip(-2)


def _within(block: Tensor, kernel: Tensor) -> Tensor:
    size = block.shape[-1]
    if size <= PRODUCT_SIZE or size % 2:
        return by_products(block, kernel, size)
    halves = block.reshape(len(block), -1, size // 2)  # [K, 2 M, size / 2]
    inside = _within(halves, kernel)
    right = inside[:, 1::2] + _from_left(halves[:, ::2], kernel, size // 2)
    return torch.cat((inside[:, ::2], right), -1)


def _from_left(left: Tensor, kernel: Tensor, size: int) -> Tensor:
    """What tokens [K, M, past] give to the `size` outputs after them; the FFT wraps round into the tokens only."""
    past = left.shape[-1]
    points = past + size
    spectrum = torch.fft.rfft(left, n=points) * torch.fft.rfft(kernel[:, None, :points], n=points)
    y: Tensor = torch.fft.irfft(spectrum, n=points)[..., past:]
    return y
