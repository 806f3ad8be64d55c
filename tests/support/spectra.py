"""Matrices, spectra of random codes, and how far products may be from exact ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.matmul import LevelForm

# relative, of products of random activations: what `spectral_matmul` promises on every processor
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def by_token(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    wanted = expected.double()
    return float(((actual.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def random_codes(rows: int, columns: int, high: int, dtype: torch.dtype, **settings: Any) -> QuantizedSpectrum:
    codes = torch.randint(-high, high + 1, (rows, columns), generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = QuantizedSpectrum(codes, torch.tensor([0.01]), 0.0, "dct", 16, (0, 1))
    return replace(plain, **settings)


def form_of(levels: Tensor) -> LevelForm:
    """Int8 levels [O, I] that are the weight itself."""
    nothing = torch.empty(0)
    others = {"scale": torch.ones(1), "row_scale": nothing, "places": nothing.int(), "beyond": nothing}
    return LevelForm(
        codes=levels,
        lowest=levels[:, :0],
        grid=nothing.to(torch.int8),
        **others,
        basis=Basis("identity", 64, ()),
        shape=(len(levels), levels.shape[1]),
        layout="int8",
    )
