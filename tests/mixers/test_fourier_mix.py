"""Fourier sums: equal to their matrices, their own adjoints, and blocks do not show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_surgery.mixers import fourier_mix as module
from spectral_surgery.mixers import slabs
from spectral_surgery.mixers.fourier_mix import causal_fourier_mix, fourier_mix
from tests.mixers.cases import tokens


def fourier_matrix(size: int, period: int | None = None) -> Tensor:
    places = torch.arange(size, dtype=torch.float64)
    turn = torch.outer(places, places) * (-2 * math.pi / (period or size))
    return torch.polar(torch.ones_like(turn), turn) / math.sqrt(period or size)


def by_matrices(x: Tensor, period: int | None = None) -> Tensor:
    over_time = fourier_matrix(x.shape[1], period)
    if period:
        places = torch.arange(x.shape[1])
        lag = places[:, None] - places
        over_time = torch.where((lag >= 0) & (lag < period), over_time, 0)
    return (over_time @ x.to(torch.complex128) @ fourier_matrix(x.shape[2])).real


@pytest.mark.parametrize("length", [1, 2, 3, 16, 37])
@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_the_transform_is_its_matrices(length: int, width: int) -> None:
    x = tokens(2, length, width, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(fourier_mix(x), by_matrices(x), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(fourier_mix, x, fast_mode=True)


@pytest.mark.parametrize(("period", "block"), [(6, 64), (6, 2), (12, 4), (14, 5), (22, 16)])
@pytest.mark.parametrize("length", [1, 5, 24, 43])
@pytest.mark.parametrize("slab", [1, 1 << 20])
def test_the_causal_sum_is_its_matrices(
    period: int, block: int, length: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(slabs, "SLAB", slab)
    x = tokens(2, length, 5, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(causal_fourier_mix(x, period), by_matrices(x, period), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda own: causal_fourier_mix(own, period), x, fast_mode=True)


@pytest.mark.parametrize("period", [6, 22])
@pytest.mark.parametrize("length", [1, 5, 43])
@pytest.mark.parametrize("width", [1, 5, 8])
def test_long_periods_are_convolutions(period: int, length: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRODUCTS", 0)
    x = tokens(2, length, width, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(causal_fourier_mix(x, period), by_matrices(x, period), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda own: causal_fourier_mix(own, period), x, fast_mode=True)


def test_a_period_far_beyond_the_sequence_takes_no_more_memory_than_the_sequence() -> None:
    x = tokens(1, 70, 4, dtype=torch.float64)
    torch.testing.assert_close(causal_fourier_mix(x, 1 << 20), by_matrices(x, 1 << 20), rtol=0, atol=1e-12)


def test_gradients_of_gradients() -> None:
    x = tokens(1, 15, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(fourier_mix, x)
    assert torch.autograd.gradgradcheck(lambda own: causal_fourier_mix(own, 6), x)
