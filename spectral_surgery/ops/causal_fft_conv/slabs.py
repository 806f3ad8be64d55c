"""The convolution a slab at a time: temporaries stay small however long the sequence, in the backward pass too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.ops.causal_fft_conv.windows import by_fft, by_products

PRODUCT_LAGS = 512  # kernels no longer than this are multiplied out; measured on 1 core, where an FFT wins from 1024 on
PRODUCT_BLOCK = 32
SLAB = 1 << 20  # entries of a temporary


@dataclass(frozen=True)
class _Plan:
    """How a convolution is cut.

    Attributes:
        size: tokens of a block, the chunk where there is one.
        past: tokens before a block that reach it.
        own_kernels: whether every block has a kernel of its own.
        products: whether kernels are multiplied out.
    """

    size: int
    past: int
    own_kernels: bool
    products: bool

    def slabs(self, signals: Tensor) -> Iterator[tuple[slice, slice]]:
        """Groups and blocks that are worked on together, of signals [G, N, past + J size]."""
        groups, blocks = len(signals), (signals.shape[-1] - self.past) // self.size
        of_block = (self.past + self.size) * (signals.shape[1] + self.own_kernels * self.size)
        of_group = 0 if self.own_kernels else (self.past + self.size) * self.size
        together = min(blocks, max(1, SLAB // of_block))
        share = max(1, SLAB // (blocks * of_block + of_group)) if together == blocks else 1
        for group in range(0, groups, share):
            for block in range(0, blocks, together):
                yield slice(group, group + share), slice(block, min(block + together, blocks))

    def tokens(self, blocks: slice) -> slice:
        """The tokens that reach some blocks."""
        return slice(blocks.start * self.size, blocks.stop * self.size + self.past)

    def kernels(self, blocks: slice) -> slice:
        """The kernels of some blocks."""
        return blocks if self.own_kernels else slice(0, 1)

    def outputs(self, signals: Tensor, kernel: Tensor) -> Tensor:
        """[G, N, past + J size] and [G, J or 1, L] to [G, N, J, size]."""
        windows = signals.unfold(-1, self.past + self.size, self.size)  # [G, N, J, past + size]
        blocks = by_products if self.products else by_fft
        with torch.autocast(signals.device.type, enabled=False):
            if not self.own_kernels:
                y = blocks(windows.flatten(1, 2), kernel[:, 0], self.size)  # [G, N J, size]
                return y.reshape((*windows.shape[:-1], self.size))
            by_block = windows.transpose(1, 2)  # [G, J, N, past + size]
            y = blocks(by_block.flatten(0, 1), kernel.flatten(0, 1), self.size)  # [G J, N, size]
        return y.reshape((*by_block.shape[:-1], self.size)).transpose(1, 2)


def convolve(x: Tensor, kernel: Tensor, chunk: int | None) -> Tensor:
    """Convolve every group with its kernels.

    Args:
        x: [G, N, T] float32 or float64.
        kernel: [G, J, L] with a chunk, else [G, 1, L]; of the dtype of x, L <= T.
        chunk: tokens of a chunk, or None.

    Returns:
        [G, N, T].
    """
    length, lags = x.shape[-1], kernel.shape[-1]
    products = lags <= PRODUCT_LAGS
    size = min(length, chunk or (PRODUCT_BLOCK if products else 1 << (lags - 1).bit_length()))
    blocks = -(-length // size)
    plan = _Plan(size, lags if blocks > 1 else 0, chunk is not None, products)
    padded = torch.nn.functional.pad(x, (plan.past, blocks * size - length))
    y: Tensor = _Convolution.apply(padded, kernel, plan)
    return y[..., :length]


class _Convolution(torch.autograd.Function):
    """[G, N, past + J size] to [G, N, J size]; the backward pass computes each slab again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, plan: _Plan) -> Tensor:
        """Fill the output slab by slab."""
        ctx.save_for_backward(x, kernel)
        ctx.plan = plan
        y = x.new_empty(*x.shape[:2], (x.shape[-1] - plan.past) // plan.size, plan.size)
        for groups, blocks in plan.slabs(x):
            y[groups, :, blocks] = plan.outputs(x[groups, :, plan.tokens(blocks)], kernel[groups, plan.kernels(blocks)])
        return y.flatten(-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Add up the gradients of the slabs."""
        x, kernel = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad = grad.reshape(*grad.shape[:2], -1, plan.size)
        grad_x, grad_kernel = torch.zeros_like(x), torch.zeros_like(kernel)
        for groups, blocks in plan.slabs(x):
            tokens, kernels = plan.tokens(blocks), plan.kernels(blocks)
            with torch.enable_grad():
                inputs = (x[groups, :, tokens].detach(), kernel[groups, kernels].detach())
                for part in inputs:
                    part.requires_grad_()
                y = plan.outputs(*inputs)
            of_x, of_kernel = torch.autograd.grad(y, inputs, grad[groups, :, blocks])
            grad_x[groups, :, tokens] += of_x
            grad_kernel[groups, kernels] += of_kernel
        return grad_x, grad_kernel, None
