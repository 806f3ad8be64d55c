"""A few tokens times an int8 or int4 matrix on a CPU: the steps of all products, but not what chooses between them.

While a language model writes, every layer multiplies one token, and its weights have pushed everything else out of the
caches: then Python takes a third of the time of a layer, and what is not called need not be fetched.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul import dispatch, integer
from spectral_surgery.matmul.activations import transform_matrix
from spectral_surgery.matmul.form import Form, times_rows
from spectral_surgery.matmul.int4 import Int4Form
from spectral_surgery.matmul.int8 import Int8Form
from spectral_surgery.transforms import IDENTITY

_CPU = torch.device("cpu")


class _Steps(NamedTuple):
    most: int  # tokens; 0 where other ways are needed
    into: Tensor | None  # [tile, tile] that tiles of activations are multiplied by; None where they stay
    back: Tensor | None  # of the product
    ones: Tensor


def few_tokens(x: Tensor, form: Form) -> Tensor | None:
    """Y = x Wᵀ, bit for bit what the general way gives.

    Returns [..., O] float32; None for whatever is not bfloat16 on a CPU without gradients, int8 or int4, and few
    tokens.

    Args:
        x: [..., I].
        form: of W, [O, I].
    """
    if x.dtype != torch.bfloat16 or not isinstance(form, Int8Form | Int4Form) or not x.is_cpu:
        return None
    if isinstance(form, Int8Form) and len(form.places):
        return None
    rows, columns = form.shape
    steps = _steps(form.basis, rows, columns, dispatch.packed_tokens(columns))
    if x.numel() > steps.most * columns or not x.numel() or x.shape[-1] != columns:
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled("cpu"):
        return None
    tile = form.basis.tile
    inside = x.reshape(-1, columns).float()
    if steps.into is not None:
        inside = (inside.view(-1, tile) @ steps.into).view(inside.shape)
    y = times_rows(_product((inside * form.scale).bfloat16(), form, steps.ones).float(), form)
    if steps.back is not None:
        y = (y.view(-1, tile) @ steps.back).view(y.shape)
    return y.view(*x.shape[:-1], rows)


def _product(x: Tensor, form: Int8Form | Int4Form, ones: Tensor) -> Tensor:
    if isinstance(form, Int8Form):
        return torch._weight_int8pack_mm(x, form.codes, ones)
    parts = [torch._weight_int8pack_mm(x, levels, ones[: len(levels)]) for _, levels in form.blocks()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@lru_cache(maxsize=1024)
def _steps(basis: Basis, rows: int, columns: int, most: int) -> _Steps:
    turned = basis.transform != IDENTITY.name
    inner, outer = (turned and axis in basis.axes for axis in (1, 0))
    aligned = not (inner and columns % basis.tile) and not (outer and rows % basis.tile)
    into, back = (
        transform_matrix(basis.transform, basis.tile, torch.float32, _CPU, inverse) if needed else None
        for needed, inverse in ((inner, False), (outer, True))
    )
    return _Steps(most if aligned else 0, into, back, integer.ones(rows, _CPU))
