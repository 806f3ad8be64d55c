"""Low-rank maps whose factors live in a transform domain, and the same maps as plain factors.

A component is one real number, or the real and imaginary parts of a complex one, laid out as [reals, imaginaries].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.registry import Table
from spectral_surgery.transforms.base import as_real
from spectral_surgery.transforms.fast import FAST, FastTransform, irfft, rfft


@dataclass(frozen=True)
class LowRankBasis:
    """How factors A and B in a transform domain act on tokens.

    Attributes:
        parts: real numbers in a component: 1, or 2 where factors are complex.
        bins: length n -> coefficients of the transform.
        down: (x [..., I], A) -> components [..., R], R = parts * r: A T x.
        up: (components [..., R], B, O) -> [..., O]: Tᵀ B z.
        fold_down: (A, I) -> [R, I] real, whose product with x is `down`.
        fold_up: (B, O) -> [O, R] real, whose product with components is `up`.
    """

    name: str
    parts: int
    bins: Callable[[int], int]
    down: Callable[[Tensor, Tensor], Tensor]
    up: Callable[[Tensor, Tensor, int], Tensor]
    fold_down: Callable[[Tensor, int], Tensor]
    fold_up: Callable[[Tensor, int], Tensor]

    def down_shape(self, r: int, in_features: int) -> tuple[int, ...]:
        """Shape of A as stored: [r, bins], and parts last where there are two."""
        return (r, self.bins(in_features), 2)[: 1 + self.parts]

    def up_shape(self, r: int, out_features: int) -> tuple[int, ...]:
        """Shape of B as stored: [bins, r], and parts last where there are two."""
        return (self.bins(out_features), r, 2)[: 1 + self.parts]

    def magnitudes(self, components: Tensor) -> Tensor:
        """[..., R] -> [..., r]."""
        if self.parts == 1:
            return components.abs()
        return torch.complex(*as_real(components).chunk(2, -1)).abs()  # autocast may have rounded them


def _real(transform: FastTransform) -> LowRankBasis:
    return LowRankBasis(
        name=transform.name,
        parts=1,
        bins=lambda n: n,
        down=lambda x, a: transform.forward(x) @ a.T,
        up=lambda z, b, _: transform.inverse(z @ b.T),
        fold_down=lambda a, _: transform.inverse(a),
        fold_up=lambda b, _: transform.inverse(b.T).T,
    )


def _complex_down(x: Tensor, a: Tensor) -> Tensor:
    z = rfft(x) @ torch.view_as_complex(a).T
    return torch.cat([z.real, z.imag], -1)


def _complex_up(z: Tensor, b: Tensor, out_features: int) -> Tensor:
    spectrum = torch.complex(*z.chunk(2, -1)) @ torch.view_as_complex(b).T
    return irfft(spectrum, out_features)


def _complex_fold_down(a: Tensor, in_features: int) -> Tensor:
    rows = torch.fft.fft(torch.view_as_complex(a), n=in_features, norm="ortho")  # bins beyond the half are zero
    return torch.cat([rows.real, rows.imag])


def _complex_fold_up(b: Tensor, out_features: int) -> Tensor:
    columns = torch.view_as_complex(b).T
    both = torch.cat([columns, 1j * columns])
    return irfft(both, out_features).T


DFT = LowRankBasis(
    name="dft",
    parts=2,
    bins=lambda n: n // 2 + 1,
    down=_complex_down,
    up=_complex_up,
    fold_down=_complex_fold_down,
    fold_up=_complex_fold_up,
)

BASES = Table("transform", (*(_real(transform) for transform in FAST.values()), DFT))
