"""y = x Wᵀ + b + x ΔWᵀ and its gradients, two operators each of whose gradients is made of the two again.

So gradients of all orders exist, but for forward mode, which torch refuses. The work is inside operators of
torch.library, which torch.compile takes as they are and autocast keeps in float32; around them are autograd functions,
since torch.func cannot differentiate such an operator itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectral_surgery.fourier.batching import loop
from spectral_surgery.fourier.beside_weight import add_backward, add_forward
from spectral_surgery.fourier.rfft_positions import SCHEMA, Delta, Places


@torch.library.custom_op(
    "spectral_surgery::fourier_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? weight, Tensor? bias, bool fused, {SCHEMA}) -> Tensor",
)
def linear_op(  # noqa: PLR0917 - operators of torch take tensors and numbers only
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fused: bool,
    coefficients: Tensor,
    indices: Tensor,
    factors: Tensor,
    out_features: int,
    in_features: int,
    scaling: float,
) -> Tensor:
    """Output of a linear map with its update: [..., O] in the dtype of x.

    Args:
        x: [..., I], any float dtype.
        weight: [O, I] in the dtype of x; None for the update alone.
        bias: [O]; None without.
        fused: the weight holds ΔW already; it is added by no one else, but the coefficients get their gradient.
        coefficients: [K] float.
        indices: as in `Places`.
        factors: as in `Places`.
    """
    if weight is None:
        y = x.new_zeros(*x.shape[:-1], out_features)
    else:
        y = functional.linear(x, weight, bias)
    if not fused:
        delta = Delta(coefficients, Places(indices, factors), (out_features, in_features), scaling)
        add_forward(y.view(-1, out_features), x.reshape(-1, in_features), delta)
    return y


@torch.library.custom_op(
    "spectral_surgery::fourier_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? x, Tensor? weight, bool want_dx, bool fused, {SCHEMA}) -> (Tensor, Tensor)",
)
def linear_backward_op(  # noqa: PLR0917 - operators of torch take tensors and numbers only
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    want_dx: bool,
    fused: bool,
    coefficients: Tensor,
    indices: Tensor,
    factors: Tensor,
    out_features: int,
    in_features: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `linear_op`.

    Returns dx [..., I] in the dtype of dy and d(coefficients) [K] in that of the coefficients; [0] for what is not
    wanted.

    Args:
        dy: [..., O].
        x: [..., I]; None when the gradient of the coefficients is not wanted.
        weight: [O, I] or None, as there.
        want_dx: whether the gradient of x is wanted.
    """
    dx = dy.new_empty(0)
    if want_dx:
        dx = dy.new_zeros(*dy.shape[:-1], in_features) if weight is None else dy @ weight
    gradient = add_backward(
        dx.view(-1, in_features) if want_dx and not fused else None,
        None if x is None else x.reshape(-1, in_features),
        dy.reshape(-1, out_features),
        Delta(coefficients, Places(indices, factors), (out_features, in_features), scaling),
    )
    return dx, coefficients.new_empty(0) if gradient is None else gradient.to(coefficients.dtype)


@linear_op.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], arguments[6])


@linear_backward_op.register_fake
def _(dy: Tensor, x: Tensor | None, _: Tensor | None, want_dx: bool, *rest: Any) -> tuple[Tensor, Tensor]:
    coefficients, in_features = rest[1], rest[5]
    dx = dy.new_empty(*dy.shape[:-1], in_features) if want_dx else dy.new_empty(0)
    return dx, coefficients.new_empty(0) if x is None else torch.empty_like(coefficients)


for _device in ("cpu", "cuda"):
    linear_op.register_autocast(_device, torch.float32)
    linear_backward_op.register_autocast(_device, torch.float32)


class _Linear(torch.autograd.Function):
    """`linear_op` with its gradients."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return linear_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, weight, _, ctx.fused, *delta = inputs
        _, needs_weight, _, _, needs_coefficients = ctx.needs_input_grad[:5]
        ctx.save_for_backward(x if needs_weight or needs_coefficients else None, weight, *delta[:3])
        ctx.rest = delta[3:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, needs_coefficients = ctx.needs_input_grad[:5]
        of_x, of_coefficients = None, None
        if needs_x or needs_coefficients:
            known = x if needs_coefficients else None
            delta = (*tensors, *ctx.rest)
            of_x, of_coefficients = fourier_linear_backward(dy, known, weight, needs_x, ctx.fused, *delta)
        return (
            of_x if needs_x else None,
            _product(dy, x) if needs_weight else None,
            dy.reshape(-1, dy.shape[-1]).sum(0) if needs_bias else None,
            None,
            of_coefficients if needs_coefficients else None,
            *[None] * 5,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Any, Any]:
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            return fourier_linear(x.movedim(in_dims[0], 0), *rest), 0
        return loop(fourier_linear, info.batch_size, in_dims, (x, *rest))


class _LinearBackward(torch.autograd.Function):
    """`linear_backward_op` with its gradients: dx = dy W + dy ΔW(c) and dc = D(x, dy) are linear in each argument."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return linear_backward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        del output
        dy, x, weight, ctx.want_dx, ctx.fused, *delta = inputs
        ctx.save_for_backward(dy, x, weight, *delta[:3])
        ctx.rest = delta[3:]

    @staticmethod
    def backward(ctx: Any, vector_x: Tensor, vector_c: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, weight, coefficients, *places = ctx.saved_tensors
        rest = (*places, *ctx.rest)
        needs_dy, needs_x, needs_weight, _, _, needs_coefficients = ctx.needs_input_grad[:6]
        grads: list[Tensor | None] = [None] * 11
        if needs_dy:
            parts = [fourier_linear(vector_x, weight, None, ctx.fused, coefficients, *rest)] if ctx.want_dx else []
            parts += [fourier_linear(x, None, None, False, vector_c, *rest)] if x is not None else []
            grads[0] = sum(parts[1:], parts[0])
        if needs_x and x is not None:
            grads[1] = fourier_linear_backward(dy, None, None, True, False, vector_c, *rest)[0]
        if needs_weight and ctx.want_dx:
            grads[2] = _product(dy, vector_x)
        if needs_coefficients and ctx.want_dx:
            grads[5] = fourier_linear_backward(dy, vector_x, None, False, False, coefficients, *rest)[1]
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return loop(fourier_linear_backward, info.batch_size, in_dims, arguments)


def fourier_linear(*arguments: Any) -> Tensor:
    """`linear_op`, differentiable."""
    y: Tensor = _Linear.apply(*arguments)
    return y


def fourier_linear_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`linear_backward_op`, differentiable."""
    gradients: tuple[Tensor, Tensor] = _LinearBackward.apply(*arguments)
    return gradients


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
