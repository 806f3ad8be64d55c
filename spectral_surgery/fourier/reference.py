"""The definition, dense and slow: what every implementation must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_weight(coefficients: Tensor, positions: Tensor, shape: tuple[int, int], scaling: float) -> Tensor:
    """ΔW = scaling * Re ifft2(F), F zero but for the coefficients.

    Args:
        coefficients: [K] real.
        positions: [K] int64, row * I + column in F, all different.
        shape: (O, I).
        scaling: factor on top of torch's 1 / (O I).

    Returns:
        [O, I] in the dtype of the coefficients.
    Source: arXiv 2405.03003, Algorithm 1.
    """
    spectrum = coefficients.new_zeros(shape[0] * shape[1]).index_put((positions,), coefficients)
    spatial: Tensor = torch.fft.ifft2(spectrum.reshape(shape)).real
    return spatial * scaling


def fourier_delta(x: Tensor, coefficients: Tensor, positions: Tensor, out_features: int, scaling: float) -> Tensor:
    """The residual x ΔWᵀ, by forming ΔW: [..., O].

    Args:
        x: [..., I] real.
        coefficients: [K] real.
        positions: [K] int64, row * I + column.
    """
    weight = delta_weight(coefficients, positions, (out_features, x.shape[-1]), scaling)
    return torch.nn.functional.linear(x, weight)
