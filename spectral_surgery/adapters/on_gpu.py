"""A low-rank update of a few tokens on a GPU in two launches, where torch's operators take a dozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from spectral_surgery import gpu
from spectral_surgery.fourier.on_gpu import components_of, expanded, rows_together
from spectral_surgery.matmul.unreadable import unreadable

FEW = 16  # tokens: a block of the kernel
_KEPT = "_kept_factors"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Kept:
    """Factors with all that does not depend on tokens multiplied in.

    Attributes:
        key: which memory they were made of, how often it had been written, and their scaling.
        held: parameters and buffers whose memory nobody else gets as long as the key names it.
        down: [R, I] float32.
        up: [R, O] float32.
    """

    def __init__(self, key: tuple[float, ...], held: list[Tensor], down: Tensor, up: Tensor) -> None:
        self.key, self.held, self.down, self.up = key, held, down, up

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # copies and pickles of the adapter go without it
        return type(None), ()


def update(
    x: Tensor, adapter: nn.Module, factors: Callable[[], tuple[Tensor, Tensor]], scaling: float
) -> Tensor | None:
    """The residual (x Aᵀ) Bᵀ of an adapter that no longer learns: [..., O] in the dtype of x.

    Returns None where kernels do not run, in training, where a gradient is wanted, and for more than 16 tokens.

    Args:
        x: [..., I] floating.
        adapter: whose parameters, of float32, make the factors; they are made again when one of these was written, or
            when it has been in training.
        factors: gives A [R, I] and B [O, R], float32.
        scaling: within B; with another one they are made again.
    """
    tokens = x.numel() // max(x.shape[-1], 1)
    if adapter.training or not 0 < tokens <= FEW or not runs(x) or torch.compiler.is_compiling():
        return None
    tensors = [*adapter.parameters(), *adapter.buffers()]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors))
    if wanted or any(unreadable(one) or one.is_inference() or one.device != x.device for one in tensors):
        return None
    key = (scaling, *(number for one in tensors for number in (one.data_ptr(), one._version)))
    kept = cast("_Kept | None", vars(adapter).get(_KEPT))
    if kept is None or kept.key != key:
        if torch.cuda.is_current_stream_capturing():
            return None  # what a graph records has no numbers yet
        with torch.inference_mode(False), torch.no_grad():
            down, up = factors()
            kept = _Kept(key, [one.detach() for one in tensors], down.contiguous(), up.T.contiguous())
        object.__setattr__(adapter, _KEPT, kept)
    return low_rank(x.reshape(-1, x.shape[-1]), kept.down, kept.up).view(*x.shape[:-1], kept.up.shape[1])


def forget(adapter: nn.Module) -> None:
    """Make factors anew: parameters may have changed without anybody knowing, as a recorded graph changes them."""
    vars(adapter).pop(_KEPT, None)


def runs(x: Tensor) -> bool:
    """Whether kernels can read x: on a GPU that has them."""
    return x.is_cuda and x.dtype in _TYPES and not unreadable(x) and gpu.available()


def low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The product (x downᵀ) up, with float32 in between: [T, O] in the dtype of x.

    Args:
        x: [T, I].
        down: [R, I] float32, contiguous.
        up: [R, O] float32, contiguous.
    """
    y = x.new_empty((len(x), up.shape[1]))
    expanded(y, components_of(rows_together(x), down, len(down)), up)
    return y
