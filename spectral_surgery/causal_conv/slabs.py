"""The convolution a slab at a time: temporaries stay small however long the sequence, in the backward pass too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.causal_conv.windows import by_fft, by_products

PRODUCT_LAGS = 512  # kernels no longer than this are multiplied out; measured on 1 core, where an FFT wins from 1024 on
PRODUCT_BLOCK = 32
SLAB = 1 << 20  # entries of a temporary


@dataclass(frozen=True)
class _Plan:
    """How a convolution is cut.

    Attributes:
        size: tokens of a block, the chunk where there is one.
        past: tokens before a block that reach it.
        own_kernels: whether every block has another kernel.
        products: whether kernels are multiplied out.
    """

    length: int
    size: int
    past: int
    own_kernels: bool
    products: bool

    def slabs(self, groups: int, signals: int) -> Iterator[_Slab]:
        """Groups and blocks that are worked on together."""
        blocks = -(-self.length // self.size)
        of_block = (self.past + self.size) * (signals + self.own_kernels * self.size)
        of_group = blocks * of_block + (not self.own_kernels) * (self.past + self.size) * self.size
        together = min(blocks, max(1, SLAB // of_block))
        share = max(1, SLAB // of_group) if together == blocks else 1
        for group in range(0, groups, share):
            for block in range(0, blocks, together):
                yield _Slab(self, slice(group, group + share), block, min(block + together, blocks))


@dataclass(frozen=True)
class _Slab:
    """Some blocks of some groups, those from start to stop."""

    plan: _Plan
    groups: slice
    start: int
    stop: int

    def inputs(self, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks need of x [G, N, T] and kernel [G, J or 1, L]."""
        first = max(self.start * self.plan.size - self.plan.past, 0)
        kernels = slice(self.start, self.stop) if self.plan.own_kernels else slice(0, 1)
        return x[self.groups, :, first : self.stop * self.plan.size], kernel[self.groups, kernels]

    def part(self, y: Tensor) -> Tensor:
        """The blocks of y [G, N, T]."""
        return y[self.groups, :, self.start * self.plan.size : self.stop * self.plan.size]

    def outputs(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The blocks of y, [g, N, tokens], of `inputs`."""
        plan = self.plan
        missing = max(plan.past - self.start * plan.size, 0)
        short = max(self.stop * plan.size - plan.length, 0)
        padded = torch.nn.functional.pad(x, (missing, short))
        windows = padded.unfold(-1, plan.past + plan.size, plan.size)  # [g, N, J, past + size]
        blocks = by_products if plan.products else by_fft
        with torch.autocast(x.device.type, enabled=False):
            if plan.own_kernels:
                by_block = windows.transpose(1, 2)  # [g, J, N, past + size]
                y = blocks(by_block.flatten(0, 1), kernel.flatten(0, 1), plan.size)  # [g J, N, size]
                y = y.reshape((*by_block.shape[:-1], plan.size)).transpose(1, 2)
            else:
                y = blocks(windows.flatten(1, 2), kernel[:, 0], plan.size)  # [g, N J, size]
        y = y.reshape(*x.shape[:2], -1)
        return y[..., : y.shape[-1] - short]


def convolve(x: Tensor, kernel: Tensor, chunk: int | None) -> Tensor:
    """Convolve every group with its kernels: [G, N, T].

    Args:
        x: [G, N, T] float32 or float64.
        kernel: [G, J, L] with a chunk, else [G, 1, L]; of the dtype of x, L <= T.
    """
    length, lags = x.shape[-1], kernel.shape[-1]
    products = lags <= PRODUCT_LAGS
    size = min(length, chunk or (PRODUCT_BLOCK if products else 1 << (lags - 1).bit_length()))
    plan = _Plan(length, size, lags if size < length else 0, chunk is not None, products)
    y: Tensor = _Convolution.apply(x, kernel, plan)
    return y


class _Convolution(torch.autograd.Function):
    """[G, N, T] to [G, N, T]; the backward pass computes each slab again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, plan: _Plan) -> Tensor:
        """Fill the output slab by slab."""
        ctx.save_for_backward(x, kernel)
        ctx.plan = plan
        y = x.new_empty(x.shape)
        for slab in plan.slabs(*x.shape[:2]):
            slab.part(y).copy_(slab.outputs(*slab.inputs(x, kernel)))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Add up the gradients of the slabs."""
        x, kernel = ctx.saved_tensors
        grads = x.new_zeros(x.shape), torch.zeros_like(kernel)
        for slab in ctx.plan.slabs(*x.shape[:2]):
            with torch.enable_grad():
                inputs = [part.detach().requires_grad_() for part in slab.inputs(x, kernel)]
                y = slab.outputs(*inputs)
            found = torch.autograd.grad(y, inputs, slab.part(grad))
            for total, part in zip(slab.inputs(*grads), found, strict=True):
                total.add_(part)
        return (*grads, None)
