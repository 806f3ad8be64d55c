"""Rates are met with the feedback in the loop, also where almost nothing is kept."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import encode_codes, feedback_factor
from spectral_surgery.codec.feedback_rate import codes_at

IDENTITY = Basis("identity", 64, ())


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    return torch.randn(320, 96, generator=generator), x.T @ x


@pytest.mark.parametrize("bits", [0.75, 2.0, 4.0])
def test_bits_are_met(case: tuple[torch.Tensor, torch.Tensor], bits: float) -> None:
    weight, moment = case
    codes = codes_at(weight, feedback_factor(moment, IDENTITY), bits, IDENTITY)
    assert encode_codes(weight, codes, IDENTITY)[1].bits_per_weight == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [0.5, 0.6, 0.8])
def test_low_rates_are_met_too_where_columns_differ(bits: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 256, generator=generator) * torch.logspace(0, -2, 256)
    x = x @ torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    basis, weight = Basis("dct", 64, (0, 1)), torch.randn(704, 256, generator=generator)
    coefficients = basis.forward(weight)
    codes = codes_at(coefficients, feedback_factor(x.T @ x, basis), bits, basis)
    assert encode_codes(coefficients, codes, basis)[1].bits_per_weight == pytest.approx(bits, rel=0.005)


def test_zeros_stay_zeros() -> None:
    codes = codes_at(torch.zeros(8, 16), torch.eye(16), 2.0, IDENTITY)
    assert not codes.values.any()
