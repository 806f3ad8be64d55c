"""y = x ΔWᵀ for ΔW = scaling * Re ifft2(sparse real spectrum)."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.fourier.dense import delta_rows as pick
from spectral_surgery.fourier.dispatch import Way, choose
from spectral_surgery.fourier.one_row import add_row
from spectral_surgery.fourier.operators import fourier_linear, fourier_weight
from spectral_surgery.fourier.rfft_positions import Delta, Places, fold

__all__ = ["Places", "adapted_linear", "delta_rows", "delta_weight", "fold", "fourier_delta"]


def fourier_delta(
    x: Tensor, coefficients: Tensor, positions: Tensor | Places, out_features: int, scaling: float
) -> Tensor:
    """The residual x ΔWᵀ, without forming ΔW: [..., O] in the dtype of x (float32 under autocast).

    Args:
        x: [..., I] any float dtype; transformed in float32, float64 as it is.
        coefficients: [K] float.
        positions: [K] integers, row * I + column, all different; or the same `fold`ed once and for all.
        scaling: factor on top of torch's 1 / (O I).
    """
    places = positions if isinstance(positions, Places) else fold(positions, out_features, x.shape[-1])
    return fourier_linear(x, None, None, False, coefficients, *places, out_features, x.shape[-1], scaling)


def delta_weight(
    coefficients: Tensor, positions: Tensor | Places, shape: tuple[int, int], scaling: float, base: Tensor | None = None
) -> Tensor:
    """ΔW, or a weight with it: [O, I] in the dtype of the base, else of the coefficients.

    Args:
        coefficients: [K] float.
        base: [O, I] to add it to, in its dtype; left as it is.
    """
    places = positions if isinstance(positions, Places) else fold(positions, *shape)
    return fourier_weight(base, coefficients, *places, *shape, scaling)


def delta_rows(ids: Tensor, coefficients: Tensor, places: Places, shape: tuple[int, int], scaling: float) -> Tensor:
    """Some rows of ΔW, the others not formed where they are many: [..., I] in the dtype of the coefficients.

    Args:
        ids: [...] int64, in 0 .. O-1.
        coefficients: [K] float.
    """
    if ids.numel() >= shape[0] // 2:  # half of them are transformed for all
        return torch.nn.functional.embedding(ids, delta_weight(coefficients, places, shape, scaling))
    return pick(ids.reshape(-1), Delta(coefficients, places, shape, scaling)).view(*ids.shape, shape[1])


def adapted_linear(  # noqa: PLR0917 - in the order of torch.nn.functional.linear
    x: Tensor, weight: Tensor, bias: Tensor | None, coefficients: Tensor, places: Places, scaling: float
) -> Tensor:
    """The output x Wᵀ + b + x ΔWᵀ, the update beside the weight or inside it, whichever is faster.

    Returns [..., O] in the dtype of x.

    Args:
        x: [..., I], any float dtype.
        weight: [O, I] in the dtype of x.
        bias: [O] or None.
        coefficients: [K] float.
    """
    shape = (weight.shape[0], weight.shape[1])
    one_row = x.numel() == shape[1] and x.is_cpu and x.dtype != torch.float64
    if one_row and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y = torch.nn.functional.linear(x, weight, bias)
        wide = y if y.dtype == torch.float32 else y.float()
        if add_row(wide, x, coefficients, places, scaling / (shape[0] * shape[1])):
            return wide if wide is y else wide.to(x.dtype)
    way = choose(x, weight, coefficients)
    if way is Way.BESIDE:
        return fourier_linear(x, weight, bias, False, coefficients, *places, *shape, scaling)
    if way is Way.INSIDE:
        held = delta_weight(coefficients.detach(), places, shape, scaling, weight)
        return fourier_linear(x, held, bias, True, coefficients, *places, *shape, scaling)
    dense: Tensor = torch.nn.functional.linear(x, delta_weight(coefficients, places, shape, scaling, weight), bias)
    return dense
