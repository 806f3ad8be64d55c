"""Which way is faster: the update beside the weight or inside it. Counts of operations, with measured costs.

The costs are nanoseconds on one core of an AVX-512 server, float32; only their ratios matter, and they hold for
several cores. On a GPU nothing was measured, and the update stays beside the weight.
"""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

_FFT = 0.12  # of n log2 n, for one real transform of n points
_MIX = 4.5  # of a coefficient and a token: gather, multiply, scatter; or two gathers, multiply, sum
_ADD = 0.4  # of a number added to another
_WRITE = 3.5  # of a number of a fresh W + ΔW
_PRODUCT = 0.02  # of a multiply-add in a matrix product


class Way(Enum):
    """Ways to compute x Wᵀ + x ΔWᵀ.

    Attributes:
        BESIDE: x Wᵀ, and x ΔWᵀ by FFTs of x; nothing of size [O, I].
        INSIDE: x (W + ΔW)ᵀ, the sum kept for backward; the gradient of the coefficients by FFTs of x and dy.
        DENSE: the same, and that gradient from dyᵀ x, one more matrix product.
    """

    BESIDE = "beside"
    INSIDE = "inside"
    DENSE = "dense"


def choose(x: Tensor, weight: Tensor, coefficients: Tensor) -> Way:
    """The fastest way that rounds nothing and keeps no more than the activations themselves take.

    ``x`` is [..., I]; ``weight`` is [O, I]; ``coefficients`` is [K].
    """
    rows, columns = weight.shape
    tokens = x.numel() // columns
    exact = weight.dtype in (torch.float32, torch.float64)  # ΔW would get lost between the steps of a half weight
    if x.is_cuda or not exact or tokens * (rows + columns) < rows * columns:
        return Way.BESIDE
    trains = torch.is_grad_enabled()
    costs = _costs(
        tokens,
        (rows, columns),
        coefficients.numel(),
        needs_x=trains and x.requires_grad,
        needs_coefficients=trains and coefficients.requires_grad,
    )
    return min(costs, key=lambda way: costs[way])


def _costs(
    tokens: int, shape: tuple[int, int], count: int, *, needs_x: bool, needs_coefficients: bool
) -> dict[Way, float]:
    rows, columns = shape
    into_x, into_y = (_FFT * n * math.log2(max(n, 2)) for n in (columns, rows))
    residuals = 2 if needs_x else 1
    beside = residuals * (into_x + into_y + _MIX * count + _ADD * rows)
    write = min(count, columns / 2) * into_y + rows / 2 * into_x + _WRITE * rows * columns
    spectral = into_x + into_y + _MIX * count
    pick = rows * into_x + min(count, columns / 2) * into_y
    product = _PRODUCT * rows * columns
    if not needs_coefficients:
        return {Way.BESIDE: tokens * beside, Way.INSIDE: write}
    return {
        Way.BESIDE: tokens * (beside + spectral - (into_y if needs_x else 0)),
        Way.INSIDE: write + tokens * spectral,
        Way.DENSE: write + pick + tokens * product,
    }
