"""W + ΔW and the gradient of its coefficients; like `linear`, operators of torch inside autograd functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_surgery.fourier.batching import loop
from spectral_surgery.fourier.dense import coefficients_of, merged_weight
from spectral_surgery.fourier.rfft_positions import SCHEMA, Delta, Places


@torch.library.custom_op(
    "spectral_surgery::fourier_weight", mutates_args=(), schema=f"(Tensor? weight, {SCHEMA}) -> Tensor"
)
def weight_op(  # noqa: PLR0917 - operators of torch take tensors and numbers only
    weight: Tensor | None,
    coefficients: Tensor,
    indices: Tensor,
    factors: Tensor,
    out_features: int,
    in_features: int,
    scaling: float,
) -> Tensor:
    """A weight with its update: [O, I] in the dtype of the weight, else of the coefficients.

    Args:
        weight: [O, I], any float dtype; None for the update alone.
        coefficients: [K] float.
        indices: as in `Places`.
        factors: as in `Places`.
    """
    return merged_weight(weight, Delta(coefficients, Places(indices, factors), (out_features, in_features), scaling))


@torch.library.custom_op(
    "spectral_surgery::fourier_weight_backward", mutates_args=(), schema=f"(Tensor gradient, {SCHEMA}) -> Tensor"
)
def weight_backward_op(  # noqa: PLR0917 - operators of torch take tensors and numbers only
    gradient: Tensor,
    coefficients: Tensor,
    indices: Tensor,
    factors: Tensor,
    out_features: int,
    in_features: int,
    scaling: float,
) -> Tensor:
    """The gradient of the coefficients of `weight_op`: [K] in the dtype of the coefficients.

    ``gradient`` is [O, I], that of its result.
    """
    delta = Delta(coefficients, Places(indices, factors), (out_features, in_features), scaling)
    return coefficients_of(gradient, delta).to(coefficients.dtype)


@weight_op.register_fake
def _(weight: Tensor | None, coefficients: Tensor, *rest: Any) -> Tensor:
    return (coefficients if weight is None else weight).new_empty(rest[2], rest[3])


@weight_backward_op.register_fake
def _(gradient: Tensor, coefficients: Tensor, *_: Any) -> Tensor:
    del gradient
    return torch.empty_like(coefficients)


class _Weight(torch.autograd.Function):
    """`weight_op` with its gradients."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return weight_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        _, *delta = inputs
        ctx.save_for_backward(*delta[:3])
        ctx.rest = delta[3:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs_weight, needs_coefficients = ctx.needs_input_grad[:2]
        delta = (*ctx.saved_tensors, *ctx.rest)
        of_coefficients = fourier_weight_backward(gradient, *delta) if needs_coefficients else None
        return (gradient if needs_weight else None, of_coefficients, *[None] * 5)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return loop(fourier_weight, info.batch_size, in_dims, arguments)


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
        return loop(fourier_weight_backward, info.batch_size, in_dims, arguments)


def fourier_weight(*arguments: Any) -> Tensor:
    """`weight_op`, differentiable."""
    weight: Tensor = _Weight.apply(*arguments)
    return weight


def fourier_weight_backward(*arguments: Any) -> Tensor:
    """`weight_backward_op`, differentiable."""
    gradient: Tensor = _WeightBackward.apply(*arguments)
    return gradient
