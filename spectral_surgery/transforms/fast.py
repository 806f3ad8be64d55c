"""Transforms of whole axes, by FFT: n log n steps where the matrices of `TRANSFORMS` take n².

The results are those of the rows of the same name in `TRANSFORMS`, which say what they are; those are the faster
ones for tiles of at most a few hundred points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from spectral_surgery.registry import Table
from spectral_surgery.transforms.base import as_real


@dataclass(frozen=True)
class FastTransform:
    """An orthonormal real transform of the last dimension, of any length.

    Attributes:
        forward: [..., n] -> [..., n]; float64 stays float64, any other real dtype gives float32.
        inverse: undoes it, and is its transpose.
        entries: (k, j, n) -> value at point j of basis function k, of k and j as they broadcast; float64.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    entries: Callable[[Tensor, Tensor, int], Tensor]

    def forward2(self, matrix: Tensor) -> Tensor:
        """Both axes of a matrix: [..., O, I] -> [..., O, I]."""
        return self.forward(self.forward(matrix).mT).mT

    def inverse2(self, spectrum: Tensor) -> Tensor:
        """Undo `forward2`."""
        return self.inverse(self.inverse(spectrum.mT).mT)


def rfft(x: Tensor) -> Tensor:
    """Orthonormal, of the last dimension: [..., n] real to [..., n // 2 + 1] complex.

    Of no rows too, which torch refuses before version 2.15 where it takes MKL.
    """
    if not x.numel():
        half = x[..., : x.shape[-1] // 2 + 1]
        return torch.complex(half, half)
    return cast(Tensor, torch.fft.rfft(x, norm="ortho"))


def irfft(spectrum: Tensor, n: int) -> Tensor:
    """Undo `rfft`: [..., n // 2 + 1] complex to [..., n] real."""
    if not spectrum.numel():
        return torch.nn.functional.pad(spectrum.real, (0, n - spectrum.shape[-1]))
    return cast(Tensor, torch.fft.irfft(spectrum, n=n, norm="ortho"))


def _dct(x: Tensor) -> Tensor:
    # Makhoul, A fast cosine transform in one and two dimensions, 1980: even points, then odd ones backwards
    x = as_real(x)
    n = x.shape[-1]
    turns, _ = _turns(n, x)
    bins = rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)) * turns
    return torch.cat([bins.real, -bins.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)


def _idct(x: Tensor) -> Tensor:
    x = as_real(x)
    n = x.shape[-1]
    _, turns = _turns(n, x)
    mirrored = torch.cat([torch.zeros_like(x[..., :1]), -x[..., n - n // 2 :].flip(-1)], -1)
    points = irfft(torch.complex(x[..., : n // 2 + 1], mirrored) * turns, n)
    half = (n + 1) // 2
    even, odd = points[..., :half], points[..., half:].flip(-1)
    if n % 2:
        odd = torch.nn.functional.pad(odd, (0, 1))
    return torch.stack([even, odd], -1).flatten(-2)[..., :n]


def _dct_entries(k: Tensor, j: Tensor, n: int) -> Tensor:
    # whole turns removed as integers: the angle stays exact for long axes
    angle = (k * (2 * j + 1) % (4 * n)).double() * (math.pi / (2 * n))
    return angle.cos() * ((2 - (k == 0).double()) / n).sqrt()


def _hartley(x: Tensor) -> Tensor:
    x = as_real(x)
    n = x.shape[-1]
    bins = rfft(x)
    mirrored = (bins.real + bins.imag)[..., 1 : (n + 1) // 2].flip(-1)
    return torch.cat([bins.real - bins.imag, mirrored], -1)


def _hartley_entries(k: Tensor, j: Tensor, n: int) -> Tensor:
    angle = (k * j % n).double() * (2 * math.pi / n)
    return (angle.cos() + angle.sin()) / math.sqrt(n)


def _turns(n: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the n // 2 + 1 bins, and their reciprocals."""
    make = _new_turns if torch.compiler.is_compiling() else _kept_turns  # a compiler keeps constants itself
    return make(n, x.dtype, x.device)


def _new_turns(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    bins = torch.arange(n // 2 + 1, dtype=torch.float64, device=device)
    turns = torch.polar((2 - (bins == 0).double()).sqrt(), bins * (-math.pi / (2 * n)))
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    return turns.to(wide), (1 / turns).to(wide)


@lru_cache(maxsize=64)
def _kept_turns(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # a tensor made in inference mode could not serve a later backward pass
    with torch.inference_mode(False), torch.no_grad():
        return _new_turns(n, dtype, device)


FAST = Table(
    "transform",
    (FastTransform("dct", _dct, _idct, _dct_entries), FastTransform("hartley", _hartley, _hartley, _hartley_entries)),
)
