"""Importance: costs, the cut that keeps a fraction, and codes of what is kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_surgery.codec.importance import Importance, threshold_at
from spectral_surgery.errors import ConfigError


def matrices() -> list[tuple[Tensor, Importance]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape, scale in (((96, 200), 1.0), ((64, 128), 3.0), ((300, 40), 1e-4)):
        rows, columns = (torch.rand(n, generator=generator).exp() for n in shape)
        found.append((scale * torch.randn(shape, generator=generator), Importance(rows, columns)))
    return found


def test_costs_are_squares_times_the_curvature() -> None:
    own = Importance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 5.0]))
    costs = own.costs(torch.tensor([[1.0, 1.0, -2.0], [0.5, 1.0, 0.0]]))
    assert costs.tolist() == [[3, 0, 20], [1.5, 0, 0]]


def test_a_product_of_rows_and_columns_is_found_again_but_for_the_damping() -> None:
    rows, columns = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0.0, 2.0])
    squares = rows[:, None] * columns
    own = Importance.of_squares(squares.mean(1), squares.mean(0))
    found = own.rows[:, None] * own.columns
    torch.testing.assert_close(found[:, 1], squares[:, 1], rtol=0.03, atol=0)  # a row of a quarter of the mean
    assert 0 < float(found[0, 0]) < 0.02 * float(found[0, 1])  # what the text never reached is not free


@pytest.mark.parametrize("squares", [torch.zeros(3), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])])
def test_gradients_that_say_nothing(squares: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"importance: squared gradients have a mean of (0|nan|inf)"):
        Importance.of_squares(squares, squares)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99])
def test_one_cut_keeps_what_costs_most_of_all_matrices(density: float) -> None:
    costs = [own.costs(c) for c, own in matrices()]
    cut = threshold_at(costs, density)
    flat = torch.cat([own.reshape(-1) for own in costs])
    exact = flat.sort(descending=True).values[round(density * len(flat)) - 1]
    assert cut.threshold == pytest.approx(float(exact), rel=2e-3)
    kept = sum(int(torch.count_nonzero(cut.codes(c, own).values)) for c, own in matrices())
    assert kept / len(flat) == pytest.approx(density, abs=5e-4)


def test_everything_is_kept_but_zeros() -> None:
    coefficients = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    coefficients[:3] = 0
    own = Importance(torch.ones(32), torch.ones(32))
    codes = threshold_at([own.costs(coefficients)], 1.0).codes(coefficients, own)
    assert torch.equal(codes.values != 0, coefficients != 0)
    error = (codes.coefficients() - coefficients).norm() / coefficients.norm()
    assert float(error) < 0.015


def test_nothing_of_a_matrix_may_be_left() -> None:
    (large, important), *_ = matrices()
    small = 1e-6 * large
    cut = threshold_at([important.costs(large), important.costs(small)], 0.2)
    assert not cut.codes(small, important).values.any()
    assert cut.codes(large, important).values.any()


def test_rounding_costs_little_beside_dropping() -> None:
    pairs = matrices()
    cut = threshold_at([own.costs(c) for c, own in pairs], 0.2)
    dropped = rounded = 0.0
    for coefficients, own in pairs:
        codes = cut.codes(coefficients, own)
        kept = codes.values != 0
        error = own.costs(codes.coefficients() - coefficients)
        assert torch.equal(codes.values[kept].sign(), coefficients[kept].sign().int())
        dropped += float(error[~kept].sum())
        rounded += float(error[kept].sum())
    assert 0.01 * dropped < rounded < 0.04 * dropped
