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
from torch.autograd import Function

from spectral_surgery.codec.encoded import rows_per_frame
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.matmul import custom_op, on_gpu, recorded
from spectral_surgery.matmul.activations import to_space, to_spectrum
from spectral_surgery.matmul.dispatch import transform_dtype
from spectral_surgery.matmul.few_tokens import few_tokens
from spectral_surgery.matmul.form import Form, coefficients, scaled
from spectral_surgery.matmul.unreadable import unreadable


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form, accuracy: torch.dtype, transposed: bool) -> Tensor:
        ctx.given = form, accuracy, transposed
        return form.product(x, accuracy, transposed=transposed).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        form, accuracy, transposed = ctx.given
        with unrounded(grads[0].device.type):
            return _Product.apply(grads[0], form, accuracy, not transposed), None, None, None


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
    return _matmul(x, forms, bias, transposed=False)


def form_matmul_transposed(x: Tensor, forms: Sequence[Form], bias: Tensor | None = None) -> Tensor:
    """Y = x V + b, with the rows of V, [I, O], in one or more forms: for weights that are stored transposed.

    The rest is as for `form_matmul`.
    """
    return _matmul(x, forms, bias, transposed=True)


def _matmul(x: Tensor, forms: Sequence[Form], bias: Tensor | None, *, transposed: bool) -> Tensor:
    if recorded.only_torch():
        with unrounded(x.device.type):
            return _with_bias(recorded.product(x, forms, transposed=transposed), bias, x.dtype)
    if torch.compiler.is_compiling():
        return custom_op.product(x, forms, bias, transposed=transposed)
    if len(forms) == 1 and not transposed and (quick := few_tokens(x, forms[0], bias)) is not None:
        return quick
    flat = _checked(x, sum(form.shape[0] for form in forms) if transposed else forms[0].shape[1])
    with unrounded(x.device.type):
        if not transposed and (whole := on_gpu.product(flat, forms, bias)) is not None:
            return whole.reshape(*x.shape[:-1], whole.shape[1])
        inputs = flat.split([form.shape[0] for form in forms], 1) if transposed else [flat] * len(forms)
        if _finite(flat):
            parts = _in_spectrum(inputs, forms, x.dtype, transposed=transposed)
        else:
            parts = [_dense(part, form, transposed=transposed) for part, form in zip(inputs, forms, strict=True)]
        if len(parts) > 1:
            parts = [torch.stack(parts).sum(0) if transposed else torch.cat(parts, 1)]
        return _with_bias(parts[0].reshape(*x.shape[:-1], parts[0].shape[1]), bias, x.dtype)


def _in_spectrum(
    inputs: Sequence[Tensor], forms: Sequence[Form], accuracy: torch.dtype, *, transposed: bool
) -> list[Tensor]:
    """What each form gives, in the dtype of the transforms."""
    into, back = (0, 1) if transposed else (1, 0)  # axes of the matrix
    dtype, parts = transform_dtype(inputs[0].device.type, len(inputs[0]), accuracy), []
    for number, (x, form) in enumerate(zip(inputs, forms, strict=True)):
        if not number or transposed or form.basis != forms[number - 1].basis:
            inside = to_spectrum(x.to(dtype), form.basis, into)
        given = scaled(inside, form, into)
        if torch.is_grad_enabled() and given.requires_grad:
            y = cast(Tensor, _Product.apply(given, form, accuracy, transposed))
        else:
            y = form.product(given, accuracy, transposed=transposed)
        parts.append(to_space(scaled(y.to(dtype), form, back), form.basis, back))
    return parts


def _dense(x: Tensor, form: Form, *, transposed: bool) -> Tensor:
    if transposed:
        return x @ torch.cat([rows.to(x.dtype) for rows in dense_rows(form)])
    return torch.cat([x @ rows.to(x.dtype).T for rows in dense_rows(form)], 1)


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


def unrounded(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off: it would round the operands of products to 16 bits."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
