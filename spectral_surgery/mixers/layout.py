"""Between tokens first [B, T, D] and channels first [B, D, T], which transforms over time want."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def transpose_tokens(x: Tensor) -> Tensor:
    """Exchange the last two of three dimensions, in memory too.

    Sequence by sequence, since torch transposes matrices several times faster than batches of them. Returns [B, N, M],
    contiguous. ``x`` is [B, M, N].
    """
    y: Tensor = _Transpose.apply(x)
    return y


class _Transpose(torch.autograd.Function):
    """The transposition and its adjoint, both fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - nothing is kept
        """[B, M, N] to [B, N, M]."""
        y = x.new_empty(len(x), x.shape[2], x.shape[1])
        for target, matrix in zip(y, x, strict=True):
            target.copy_(matrix.contiguous().T)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004 - torch gives a context
        """[B, N, M] to [B, M, N]."""
        return transpose_tokens(grad)
