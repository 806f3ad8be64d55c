"""Refitted scales: never worse, the optimum, and nothing where there is nothing to scale."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import Codes, feedback_codes, feedback_factor, output_error
from spectral_surgery.codec.rate import Quantizer
from spectral_surgery.codec.refit import refit_rows_and_columns, refit_step

IDENTITY = Basis("identity", 64, ())


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, Codes]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight, moment = torch.randn(30, 24, generator=generator), x.T @ x
    return weight, moment, feedback_codes(weight, feedback_factor(moment, IDENTITY), Quantizer(1.1, 2.0))


def test_the_step_is_the_best_one(case: tuple[torch.Tensor, torch.Tensor, Codes]) -> None:
    weight, moment, codes = case
    own = refit_step(weight, codes, moment)
    best = output_error(weight, own.coefficients(), moment)
    assert best < output_error(weight, codes.coefficients(), moment)
    for factor in (0.99, 1.01):
        assert best < output_error(weight, own.coefficients() * factor, moment)
    nothing = Codes(torch.zeros(30, 24, dtype=torch.int32), 1.0)
    assert refit_step(weight, nothing, moment) is nothing


def test_rows_and_columns_are_found_again(case: tuple[torch.Tensor, torch.Tensor, Codes]) -> None:
    weight, moment, codes = case
    rows, columns, scaled = refit_rows_and_columns(weight, codes.coefficients(), moment)
    assert (rows.dtype, columns.shape) == (torch.float16, (24,))
    step = refit_step(weight, codes, moment).coefficients()
    assert output_error(weight, scaled, moment) < output_error(weight, step, moment)
    bent = weight * torch.linspace(0.5, 2, 30)[:, None] * torch.linspace(2, 0.5, 24)
    assert output_error(bent, refit_rows_and_columns(bent, weight, moment)[2], moment) < 0.05
