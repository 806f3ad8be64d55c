"""Sequences filtered in their spectrum over time: transform, a function of the spectrum, inverse.

The backward pass transforms once more instead of keeping the spectrum, and needs no complex transform of full length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.mixers.layout import transpose_tokens


def filtered(function: Callable[..., Tensor], slabs: Sequence[slice], x: Tensor, *others: Tensor) -> Tensor:
    """Apply a function to the spectrum of x, some channels at a time: [B, T, D]. Differentiable once.

    Args:
        function: (spectrum [B, F, n], its channels, *others) to a spectrum of the same shape, complex and
            orthonormal, F = T // 2 + 1.
        slabs: runs of channels that together are all of them.
        x: [B, T, D] float32 or float64.
        others: whole, for every slab.
    """
    y: Tensor = _Filtered.apply(function, slabs, x, *others)
    return y


class _Filtered(torch.autograd.Function):
    """The slabs, one after the other."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], slabs: Sequence[slice], x: Tensor, *others: Tensor
    ) -> Tensor:
        """Fill the output slab by slab."""
        ctx.save_for_backward(x, *others)
        ctx.function, ctx.slabs = function, slabs
        y = x.new_empty(x.shape)
        with torch.autocast(x.device.type, enabled=False):
            for slab in slabs:
                y[..., slab] = _tokens(function(_spectrum(x[..., slab]), slab, *others), x.shape[1])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the gradients of the slabs."""
        x, *others = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        x_grad = x.new_empty(x.shape) if needed[0] else None
        rest = [torch.zeros_like(other) if need else None for other, need in zip(others, needed[1:], strict=True)]
        for slab in ctx.slabs:
            inputs = [
                tensor.detach().requires_grad_(need)
                for tensor, need in zip((_spectrum(x[..., slab]), *others), needed, strict=True)
            ]
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                z = ctx.function(inputs[0], slab, *inputs[1:])
            # a frequency within stands for its conjugate too, which counts on the way there and on the way back
            outer = _scale_inner(_spectrum(grad[..., slab]), x.shape[1], 2.0)
            grads = iter(torch.autograd.grad(z, [tensor for tensor in inputs if tensor.requires_grad], outer))
            if x_grad is not None:
                x_grad[..., slab] = _tokens(_scale_inner(next(grads), x.shape[1], 0.5), x.shape[1])
            for total in rest:
                if total is not None:
                    total.add_(next(grads))
        return None, None, x_grad, *rest


def _spectrum(x: Tensor) -> Tensor:
    """[B, T, n] to [B, F, n], channels first in memory."""
    spectrum: Tensor = torch.fft.rfft(transpose_tokens(x), norm="ortho")
    return spectrum.transpose(1, 2)


def _tokens(spectrum: Tensor, length: int) -> Tensor:
    """[B, F, n] to [B, T, n]."""
    return transpose_tokens(torch.fft.irfft(spectrum.transpose(1, 2), n=length, norm="ortho"))


def _scale_inner(spectrum: Tensor, length: int, factor: float) -> Tensor:
    """All but the frequencies that are self-conjugate, zero and that of Nyquist; in place."""
    spectrum[:, 1 : (length + 1) // 2].mul_(factor)
    return spectrum
