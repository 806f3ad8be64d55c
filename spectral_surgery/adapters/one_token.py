"""A low-rank update of one token in one call of a kernel: while text is written, calls take longer than arithmetic."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.fourier.one_row import radices_of, roots_of

Plan = tuple[Any, ...]  # cosines, sines, radices and turns, as `kernels.low_rank.update` has them


def update(
    x: Tensor, factors: tuple[Tensor, Tensor], mask: Tensor | None, scale: float, name: str, *, out_features: int
) -> Tensor | None:
    """``scale * T_outᵀ B diag(mask) A T_in x`` of one token.

    Returns [..., O] float32; None where gradients are wanted, tensors are no plain ones on a CPU, factors are complex
    or not float32, or a length has a large prime factor.

    Args:
        x: [..., I] of I elements, any float dtype but float64.
        factors: A and B as in `low_rank.LowRankBasis`.
        mask: [r] int8 of ones and zeros; None for ones.
        name: in `low_rank.BASES`.
    """
    if not all(map(_has_numbers, (x, *factors))) or {x.dtype for x in factors} != {torch.float32}:
        return None
    into, back = _plan(x.shape[-1], -1), _plan(out_features, 1)
    if x.dtype == torch.float64 or into is None or back is None or name not in _NAMES:
        return None
    from spectral_surgery.kernels.low_rank import KINDS
    from spectral_surgery.kernels.low_rank import update as kernel

    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32, device="cpu")
    a, b = (factor.detach().numpy() for factor in factors)
    row = x.detach().reshape(-1)
    numbers = (row if row.dtype == torch.float32 else row.float()).numpy()
    kernel(numbers, a, b, _ALL if mask is None else mask.numpy(), scale, KINDS[name], into, back, y.view(-1).numpy())
    return y


_ALL = np.empty(0, np.int8)
_NAMES = ("dct", "hartley")  # with complex factors, torch's operations take as long as one call


def _has_numbers(x: Tensor) -> bool:
    """Whether a kernel can read a tensor: of a CPU, without gradients, and nobody follows what is done with it."""
    if not x.is_cpu or not x.is_floating_point() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    followed = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_contiguous() and not followed and not x.is_neg()


@lru_cache(maxsize=64)
def _plan(length: int, sign: int) -> Plan | None:
    """For a length; None where that has a large prime factor."""
    radices = radices_of(length)
    if radices is None:
        return None
    angles = np.arange(length // 2 + 1) * (np.pi / (2 * length))
    turns = np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)])
    turns[:, 0] = 1, 0
    return *roots_of(length, sign), np.array(radices, np.int64), turns.astype(np.float32)
