"""W + ΔW as a differentiable operator of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectral_surgery.ops.fourier_delta.batching import register_loop
from spectral_surgery.ops.fourier_delta.dense import coefficients_of, merged_weight
from spectral_surgery.ops.fourier_delta.places import SCHEMA, Delta, Places


@torch.library.custom_op(
    "spectral_surgery::fourier_weight", mutates_args=(), schema=f"(Tensor? weight, {SCHEMA}) -> Tensor"
)
def fourier_weight(  # noqa: PLR0917 - operators of torch take tensors and numbers only
    weight: Tensor | None,
    coefficients: Tensor,
    indices: Tensor,
    factors: Tensor,
    out_features: int,
    in_features: int,
    scaling: float,
) -> Tensor:
    """A weight with its update.

    Args:
        weight: [O, I], any float dtype; None for the update alone.
        coefficients: [K] float.
        indices: as in `Places`.
        factors: as in `Places`.
        out_features: O.
        in_features: I.
        scaling: of the update.

    Returns:
        [O, I] in the dtype of the weight, else of the coefficients.
    """
    return merged_weight(weight, Delta(coefficients, Places(indices, factors), (out_features, in_features), scaling))


@torch.library.custom_op(
    "spectral_surgery::fourier_weight_backward", mutates_args=(), schema=f"(Tensor gradient, {SCHEMA}) -> Tensor"
)
def fourier_weight_backward(  # noqa: PLR0917
    gradient: Tensor,
    coefficients: Tensor,
    indices: Tensor,
    factors: Tensor,
    out_features: int,
    in_features: int,
    scaling: float,
) -> Tensor:
    """The gradient of the coefficients of `fourier_weight`.

    Args:
        gradient: [O, I], that of its result.
        coefficients: as there, and what follows.
        indices: as there.
        factors: as there.
        out_features: O.
        in_features: I.
        scaling: as there.

    Returns:
        [K] in the dtype of the coefficients.
    """
    delta = Delta(coefficients, Places(indices, factors), (out_features, in_features), scaling)
    return coefficients_of(gradient, delta).to(coefficients.dtype)


@fourier_weight.register_fake
def _(weight: Tensor | None, coefficients: Tensor, *rest: Any) -> Tensor:
    return (coefficients if weight is None else weight).new_empty(rest[2], rest[3])


@fourier_weight_backward.register_fake
def _(gradient: Tensor, coefficients: Tensor, *_: Any) -> Tensor:
    del gradient
    return torch.empty_like(coefficients)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, *delta = inputs
    ctx.save_for_backward(*delta[:3])
    ctx.rest = delta[3:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs_weight, needs_coefficients = ctx.needs_input_grad[:2]
    delta = (*ctx.saved_tensors, *ctx.rest)
    of_coefficients = fourier_weight_backward(gradient, *delta) if needs_coefficients else None
    return (gradient if needs_weight else None, of_coefficients, *[None] * 5)


def _backward_backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
    _, *places = ctx.saved_tensors
    return (fourier_weight(None, vector, *places, *ctx.rest), *[None] * 6)


fourier_weight.register_autograd(_backward, setup_context=_remember)
fourier_weight_backward.register_autograd(_backward_backward, setup_context=_remember)
register_loop(fourier_weight)
register_loop(fourier_weight_backward)
