"""Y = x Wᵀ from a resident form, with a gradient to x.

Forms, processors and numbers of tokens take different ways, which round at different places: a 16-bit product of a
block of rows is rounded before blocks are added up, for one. All of them keep one promise. The error of the output of a
token, beside the exact product with the decompressed matrix, has a norm of at most 2e-6 of that output for float64 and
float32 (scales are float32), 2^-11 for float16 and 2^-7 for bfloat16; more only where the terms of its sums cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from spectral_surgery.codec.encoded import rows_per_frame
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.matmul import custom_op, recorded
from spectral_surgery.matmul.activations import columns_to_space, rows_to_spectrum, to_space, to_spectrum
from spectral_surgery.matmul.dispatch import transform_dtype
from spectral_surgery.matmul.few_tokens import few_tokens
from spectral_surgery.matmul.form import Form, coefficients, times_rows
from spectral_surgery.matmul.unreadable import unreadable


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form, accuracy: torch.dtype) -> Tensor:
        ctx.form, ctx.accuracy, ctx.dtype = form, accuracy, x.dtype
        return form.product(x, accuracy).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        with unrounded(grads[0].device.type):
            return _Adjoint.apply(grads[0], ctx.form, ctx.accuracy), None, None


class _Adjoint(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, form: Form, accuracy: torch.dtype) -> Tensor:
        ctx.form, ctx.accuracy = form, accuracy
        return form.adjoint(g, accuracy).to(g.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        with unrounded(grads[0].device.type):
            return _Product.apply(grads[0], ctx.form, ctx.accuracy), None, None


def form_matmul(x: Tensor, forms: Sequence[Form], bias: Tensor | None = None) -> Tensor:
    """Y = x Wᵀ + b, with the rows of W in one or more forms; see the module for how exact it is.

    Returns [..., O] in the dtype of x, rounded once.

    Args:
        x: [..., I] floating.
        forms: their rows follow each other.
        bias: [O] or None.

    Raises:
        ShapeError: when the width of x is not I.
        ConfigError: when x is not floating.
    """
    if recorded.whole_graph() or forward_ad._current_level >= 0:  # tangents go through torch's operations alone
        with unrounded(x.device.type):
            return _with_bias(recorded.product(x, forms), bias, x.dtype)
    if torch.compiler.is_compiling():
        return custom_op.product(x, forms, bias, transposed=False)
    if len(forms) == 1 and (quick := few_tokens(x, forms[0], bias)) is not None:
        return quick
    flat = _checked(x, forms[0].shape[1])
    with unrounded(x.device.type):
        parts = []
        if not _finite(flat):
            parts = [flat @ rows.to(flat.dtype).T for form in forms for rows in dense_rows(form)]
        wide = flat.to(transform_dtype(flat.device.type, len(flat), x.dtype))
        for number, form in enumerate(forms if not parts else ()):
            if not number or form.basis != forms[number - 1].basis:
                inside = to_spectrum(wide, form.basis)
            y = _product(inside * form.scale.to(wide.dtype), form, x.dtype)
            parts.append(to_space(times_rows(y.to(wide.dtype), form), form.basis))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return _with_bias(whole.reshape(*x.shape[:-1], whole.shape[1]), bias, x.dtype)


def form_matmul_transposed(x: Tensor, forms: Sequence[Form], bias: Tensor | None = None) -> Tensor:
    """Y = x V + b, with the rows of V, [I, O], in one or more forms: for weights that are stored transposed.

    Returns [..., O], as `form_matmul`.

    Args:
        x: [..., I] floating.
        forms: their rows follow each other.
        bias: [O] or None.

    Raises:
        ShapeError: when the width of x is not I.
        ConfigError: when x is not floating.
    """
    if recorded.whole_graph() or forward_ad._current_level >= 0:
        with unrounded(x.device.type):
            return _with_bias(recorded.product_transposed(x, forms), bias, x.dtype)
    if torch.compiler.is_compiling():
        return custom_op.product(x, forms, bias, transposed=True)
    flat = _checked(x, sum(form.shape[0] for form in forms))
    with unrounded(x.device.type):
        dense = not _finite(flat)
        wide = flat.to(transform_dtype(flat.device.type, len(flat), x.dtype))
        parts, start = [], 0
        for form in forms:
            stop = start + form.shape[0]
            if dense:
                parts.append(flat[:, start:stop] @ torch.cat(list(dense_rows(form))).to(flat.dtype))
            else:
                inside = rows_to_spectrum(wide[:, start:stop], form.basis)
                y = _adjoint(times_rows(inside, form), form, x.dtype)
                parts.append(columns_to_space(y.to(wide.dtype) * form.scale.to(wide.dtype), form.basis))
            start = stop
        whole = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return _with_bias(whole.reshape(*x.shape[:-1], whole.shape[1]), bias, x.dtype)


def dense_rows(form: Form) -> Iterator[Tensor]:
    """W as blocks of whole tiles of rows, [r, I] float32."""
    rows, columns = form.shape
    height = rows_per_frame(columns, form.basis.tile)
    for start in range(0, rows, height):
        numbers = torch.arange(start, min(start + height, rows), device=form.scale.device)
        yield form.basis.inverse(coefficients(form, numbers))


def _finite(x: Tensor) -> bool:
    """Whether all of x, on a CPU, is finite; else a transform would spread infinities over a whole tile."""
    if not x.is_cpu or not x.numel() or unreadable(x):
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(x.detach()))


def _with_bias(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias).to(dtype)


def _checked(x: Tensor, columns: int) -> Tensor:
    if not x.is_floating_point():
        raise ConfigError(f"spectral matmul: x is {x.dtype}; expected a floating type. Convert x first.")
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ShapeError(f"spectral matmul: x is {tuple(x.shape)}; expected [..., {columns}].")
    return x.reshape(-1, columns)


def _product(x: Tensor, form: Form, accuracy: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Product.apply(x, form, accuracy))
    return form.product(x, accuracy)


def _adjoint(x: Tensor, form: Form, accuracy: torch.dtype) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Adjoint.apply(x, form, accuracy))
    return form.adjoint(x, accuracy)


def unrounded(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off: it would round the operands of products to 16 bits."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
