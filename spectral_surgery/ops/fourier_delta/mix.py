"""From the bins of one spectrum to those of another: gather, multiply, scatter; and the sums its gradient needs."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(spectrum: Tensor, source: Tensor, target: Tensor, weights: Tensor, bins: int) -> Tensor:
    """Sums of weighted bins.

    Args:
        spectrum: [T, F] complex.
        source: [K] int64, bins to take.
        target: [K] int64, where to add them.
        weights: [K, 2] real factors of the real and the imaginary parts.
        bins: of the result.

    Returns:
        [T, bins] complex.
    """
    rows = len(spectrum)
    taken = spectrum.gather(1, source.expand(rows, -1))
    torch.view_as_real(taken).mul_(weights)
    return taken.new_zeros(rows, bins).scatter_add_(1, target.expand(rows, -1), taken)


def dot(one: Tensor, one_bins: Tensor, other: Tensor, other_bins: Tensor) -> Tensor:
    """Sums over rows of products of bins, real and imaginary parts apart.

    Args:
        one: [T, F] complex.
        one_bins: [K] int64.
        other: [T, G] complex.
        other_bins: [K] int64.

    Returns:
        [K, 2] real.
    """
    rows = len(one)
    products = torch.view_as_real(one.gather(1, one_bins.expand(rows, -1)))
    return products.mul_(torch.view_as_real(other.gather(1, other_bins.expand(rows, -1)))).sum(0)
