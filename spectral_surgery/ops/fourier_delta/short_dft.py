"""The discrete Fourier transform of one row, as two small matrix products.

An FFT library prepares every call; for a single row this takes longer than the transform. Here a length n = a b is
split once, after Cooley and Tukey, into transforms of a and b points with phases between them; all tables are cached.
Frequencies k = k1 + a k2 of real signals are kept for k1 <= a / 2 only, as bin k2 (a // 2 + 1) + k1.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_surgery.ops.fourier_delta.places import factor


class Tables(NamedTuple):
    """Constants of one length.

    Attributes:
        first: [a, 2 H] cosines and minus sines of a points, H = a // 2 + 1 frequencies.
        phases: [2, b, H] complex, and their conjugates.
        second: [2, b, b] complex, and their conjugates.
    """

    first: Tensor
    phases: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]


@lru_cache(maxsize=64)
def tables(length: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """Constants of a length, for float32 or float64."""
    a = factor(length)
    b = length // a
    half = a // 2 + 1
    first = torch.view_as_real(_roots(a, half, a)).reshape(a, 2 * half).to(device, dtype)
    narrow = torch.complex128 if dtype == torch.float64 else torch.complex64
    phases, second = _roots(b, half, length).to(device, narrow), _roots(b, b, b).to(device, narrow)
    return Tables(first, (phases, phases.conj().resolve_conj()), (second, second.conj().resolve_conj()))


def bins(length: int) -> int:
    """The number of bins of a length, b H."""
    a = factor(length)
    return length // a * (a // 2 + 1)


def spectrum(x: Tensor) -> Tensor:
    """The sums of x[i] e^{-2πi k i / n} over i.

    Args:
        x: [1, n] float32 or float64.

    Returns:
        [1, b H] complex, one for each bin.
    """
    first, (phases, _), (second, _) = tables(x.shape[1], x.dtype, x.device)
    parts = torch.mm(x.reshape(-1, len(phases)).t(), first).view(phases.dtype)  # [b, H]
    return torch.mm(second, parts.mul_(phases)).view(1, -1)


def real_sum(spectrum: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The real parts of the sums of spectrum[k] e^{2πi k i / n} over k.

    Args:
        spectrum: [1, b H] complex.
        length: n.
        dtype: float32 or float64, that of the parts.

    Returns:
        [1, n].
    """
    first, (_, phases), (_, second) = tables(length, dtype, spectrum.device)
    parts = torch.mm(second, spectrum.view(phases.shape)).mul_(phases).view(dtype)  # [b, 2 H]
    return torch.mm(first, parts.t()).view(1, -1)


def _roots(rows: int, columns: int, length: int) -> Tensor:
    # [rows, columns] e^{-2πi r k / length}, in double precision; r k is reduced first, to stay exact
    turns = torch.outer(torch.arange(rows), torch.arange(columns)) % length
    angles = turns.double() * (2 * math.pi / length)
    return torch.complex(angles.cos(), -angles.sin())
