"""The orthonormal Haar wavelet transform over all levels, for any length.

A span splits into halves (the left one is longer where the length is odd) until single points are
left, and each split gives one coefficient. The unbalanced weights keep the rows orthonormal and a
constant at one coefficient; at powers of two this is the classical Haar basis, coarse to fine.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from spectral_surgery.transforms.base import Transform, any_length


def matrix(n: int) -> Tensor:
    """Return the [n, n] float64 basis: the mean, then the splits breadth first."""
    basis = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    basis[0] = 1 / math.sqrt(n)
    spans = deque([(0, n)])
    row = 1
    while spans:
        start, stop = spans.popleft()
        if stop - start < 2:
            continue
        middle = (start + stop + 1) // 2
        left, right = middle - start, stop - middle
        basis[row, start:middle] = math.sqrt(right / (left * (left + right)))
        basis[row, middle:stop] = -math.sqrt(left / (right * (left + right)))
        spans.extend([(start, middle), (middle, stop)])
        row += 1
    return basis


HAAR = Transform(
    "haar", matrix, any_length, source="Haar 1910; odd lengths: Girardi and Sweldens, Unbalanced Haar wavelets, 1997"
)
