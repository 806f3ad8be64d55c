"""The definition, as a plain sum: what every implementation must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(x: Tensor, kernel: Tensor, chunk: int | None = None) -> Tensor:
    """y[n, t] = sum over s of kernel[j, s] x[n, t - s], with s from 0 to min(t, L - 1) and j = t // chunk.

    Args:
        kernel: [..., L], or [..., J, L] with a chunk: kernel j makes the outputs of chunk j.
    Source: causal convolution as in Hyena, arXiv 2302.10866, section 3, with a kernel that may change over time.
    """
    length = x.shape[-1]
    if chunk is None:
        of_token = kernel.unsqueeze(-2).expand(*kernel.shape[:-1], length, -1)  # [..., T, L]
    else:
        of_token = kernel.repeat_interleave(chunk, dim=-2)[..., :length, :]
    y = torch.zeros_like(x)
    for lag in range(min(length, kernel.shape[-1])):
        past = torch.nn.functional.pad(x, (lag, 0))[..., :length]
        y = y + of_token[..., lag].unsqueeze(-2) * past
    return y
