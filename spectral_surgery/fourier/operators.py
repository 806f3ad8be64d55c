"""The two products with an update as operators of torch, with their gradients: y = x Wᵀ + b + x ΔWᵀ, and W + ΔW.

The gradients of each are an operator too, and its gradients are made of the same ones again. So gradients of all orders
exist, but for forward mode, which torch refuses. The work is inside operators of torch.library, which torch.compile
takes as they are and autocast keeps in float32; around them are autograd functions, since torch.func cannot
differentiate such an operator itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from spectral_surgery.fourier import on_gpu
from spectral_surgery.fourier.beside_weight import add_backward, add_forward
from spectral_surgery.fourier.dense import coefficients_of, merged_weight
from spectral_surgery.fourier.rfft_positions import Delta, Places

# the arguments that make a Delta
_DELTA = "Tensor coefficients, Tensor indices, Tensor factors, int out_features, int in_features, float scaling"


def _operator(name: str, takes: str, gives: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of torch of a function whose last argument is a `Delta`; ``fake`` says the shapes it gives."""

    def make(function: Callable[..., Any]) -> Any:
        def on_delta(work: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                *given, coefficients, indices, factors, out_features, in_features, scaling = arguments
                return work(*given, Delta(coefficients, Places(indices, factors), (out_features, in_features), scaling))

            return call

        schema = f"({takes}, {_DELTA}) -> {gives}"
        operator = torch.library.custom_op(
            f"spectral_surgery::{name}", on_delta(function), mutates_args=(), schema=schema
        )
        operator.register_fake(on_delta(fake))
        return operator

    return make


@_operator(
    "fourier_linear",
    *("Tensor x, Tensor? weight, Tensor? bias, bool fused", "Tensor"),
    fake=lambda x, weight, bias, fused, delta: x.new_empty(*x.shape[:-1], delta.shape[0]),  # noqa: ARG005 - as called
)
def linear_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, fused: bool, delta: Delta) -> Tensor:
    """Output of a linear map with its update: [..., O] in the dtype of x.

    Args:
        x: [..., I], any float dtype.
        weight: [O, I] in the dtype of x; None for the update alone.
        bias: [O]; None without.
        fused: the weight holds ΔW already; it is not added, but the coefficients get their gradient.
        delta: the update, its coefficients [K] float.
    """
    rows, columns = delta.shape
    flat = x.reshape(-1, columns)
    few = not fused and on_gpu.suits(flat, delta)
    if weight is not None:
        y = functional.linear(x, weight, bias)
    else:
        y = (x.new_empty if few else x.new_zeros)((*x.shape[:-1], rows))
    if few:
        on_gpu.add_forward(y.view(-1, rows), flat, delta, fresh=weight is None)
    elif not fused:
        add_forward(y.view(-1, rows), flat, delta)
    return y


def _shapes_of_gradients(
    dy: Tensor, x: Tensor | None, _: object, want_dx: bool, __: bool, delta: Delta
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], delta.shape[1]) if want_dx else dy.new_empty(0)
    return dx, delta.coefficients.new_empty(0) if x is None else torch.empty_like(delta.coefficients)


@_operator(
    "fourier_linear_backward",
    *("Tensor dy, Tensor? x, Tensor? weight, bool want_dx, bool fused", "(Tensor, Tensor)"),
    fake=_shapes_of_gradients,
)
def linear_backward_op(  # noqa: PLR0917 - operators of torch take tensors and numbers only
    dy: Tensor, x: Tensor | None, weight: Tensor | None, want_dx: bool, fused: bool, delta: Delta
) -> tuple[Tensor, Tensor]:
    """Gradients of `linear_op`.

    Returns dx [..., I] in the dtype of dy and d(coefficients) [K] in that of the coefficients; [0] for what is not
    wanted.

    Args:
        dy: [..., O].
        x: [..., I]; None when the gradient of the coefficients is not wanted.
        want_dx: whether the gradient of x is wanted.
    """
    rows, columns = delta.shape
    flat, given = dy.reshape(-1, rows), None if x is None else x.reshape(-1, columns)
    few = on_gpu.suits(flat, delta)
    dx = dy.new_empty(0)
    if want_dx and weight is not None:
        dx = dy @ weight
    elif want_dx:
        dx = (dy.new_empty if few and not fused else dy.new_zeros)((*dy.shape[:-1], columns))
    to = dx.view(-1, columns) if want_dx and not fused else None
    if few:
        gradient = on_gpu.add_backward(to, given, flat, delta, fresh=weight is None)
    else:
        gradient = add_backward(to, given, flat, delta)
    coefficients = delta.coefficients
    return dx, coefficients.new_empty(0) if gradient is None else gradient.to(coefficients.dtype)


@_operator(
    "fourier_weight",
    *("Tensor? weight", "Tensor"),
    fake=lambda weight, delta: (delta.coefficients if weight is None else weight).new_empty(*delta.shape),
)
def weight_op(weight: Tensor | None, delta: Delta) -> Tensor:
    """A weight with its update: [O, I] in the dtype of the weight, else of the coefficients; None for ΔW alone."""
    return merged_weight(weight, delta)


@_operator(
    "fourier_weight_backward",
    *("Tensor gradient", "Tensor"),
    fake=lambda _, delta: torch.empty_like(delta.coefficients),
)
def weight_backward_op(gradient: Tensor, delta: Delta) -> Tensor:
    """The gradient of the coefficients, [K] in their dtype, from that of the result of `weight_op`, [O, I]."""
    return coefficients_of(gradient, delta).to(delta.coefficients.dtype)


for _device in ("cpu", "cuda"):
    linear_op.register_autocast(_device, torch.float32)
    linear_backward_op.register_autocast(_device, torch.float32)


def _one_by_one(
    function: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """What torch.vmap gets of a function without further leading dimensions: results stacked, and where: first."""
    results = []
    for index in range(size):
        pairs = zip(arguments, in_dims, strict=True)
        results.append(function(*(value if dim is None else value.select(dim, index) for value, dim in pairs)))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    parts = tuple(torch.stack(part) for part in zip(*results, strict=True))
    return parts, (0,) * len(parts)


class _Linear(torch.autograd.Function):
    """`linear_op` with its gradients."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return linear_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - as torch calls it
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
            of_x, of_coefficients = _linear_backward(dy, known, weight, needs_x, ctx.fused, *delta)
        return (
            of_x if needs_x else None,
            _product(dy, x) if needs_weight else None,
            dy.reshape(-1, dy.shape[-1]).sum(0) if needs_bias else None,
            None,
            of_coefficients if needs_coefficients else None,
            *[None] * 5,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        x, *rest = arguments
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            return fourier_linear(x.movedim(in_dims[0], 0), *rest), 0
        return _one_by_one(fourier_linear, info.batch_size, in_dims, arguments)


class _LinearBackward(torch.autograd.Function):
    """`linear_backward_op` with its gradients: dx = dy W + dy ΔW(c) and dc = D(x, dy) are linear in each argument."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return linear_backward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG004 - as torch calls it
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
            grads[1] = _linear_backward(dy, None, None, True, False, vector_c, *rest)[0]
        if needs_weight and ctx.want_dx:
            grads[2] = _product(dy, vector_x)
        if needs_coefficients and ctx.want_dx:
            grads[5] = _linear_backward(dy, vector_x, None, False, False, coefficients, *rest)[1]
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _one_by_one(_linear_backward, info.batch_size, in_dims, arguments)


class _Weight(torch.autograd.Function):
    """`weight_op` with its gradients."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return weight_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - as torch calls it
        ctx.save_for_backward(*inputs[1:4])
        ctx.rest = inputs[4:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs_weight, needs_coefficients = ctx.needs_input_grad[:2]
        delta = (*ctx.saved_tensors, *ctx.rest)
        of_coefficients = _weight_backward(gradient, *delta) if needs_coefficients else None
        return (gradient if needs_weight else None, of_coefficients, *[None] * 5)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _one_by_one(fourier_weight, info.batch_size, in_dims, arguments)


class _WeightBackward(torch.autograd.Function):
    """`weight_backward_op` with its gradient."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return weight_backward_op(*arguments)

    setup_context = _Weight.setup_context

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        _, *places = ctx.saved_tensors
        return (fourier_weight(None, vector, *places, *ctx.rest), *[None] * 6)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _one_by_one(_weight_backward, info.batch_size, in_dims, arguments)


def fourier_linear(*arguments: Any) -> Tensor:
    """`linear_op`, differentiable; the six values of the schema in the place of a `Delta`."""
    return cast(Tensor, _apply(_Linear, linear_op, arguments))


def fourier_weight(*arguments: Any) -> Tensor:
    """`weight_op`, differentiable; the six values of the schema in the place of a `Delta`."""
    return cast(Tensor, _apply(_Weight, weight_op, arguments))


def _linear_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", _apply(_LinearBackward, linear_backward_op, arguments, second=True))


def _weight_backward(*arguments: Any) -> Tensor:
    return cast(Tensor, _apply(_WeightBackward, weight_backward_op, arguments, second=True))


def _apply(
    function: type[torch.autograd.Function], operator: Any, arguments: tuple[Any, ...], *, second: bool = False
) -> Any:
    """The function, or the operator where no gradients are asked for, as torch before 2.15 would fail to compile it."""
    if torch.compiler.is_compiling():
        differentiable = (isinstance(value, Tensor) and value.requires_grad for value in arguments)
        if second or not (torch.is_grad_enabled() and any(differentiable)):  # nothing compiled has second derivatives
            return operator(*arguments)
    return function.apply(*arguments)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
