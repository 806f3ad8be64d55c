"""The kept set: as dense as was asked, the least error that its positions allow, and better than what is largest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_surgery.calibration.kept_set import in_domain, keep_best, kept_codes
from spectral_surgery.codec.encoded import Basis


@pytest.fixture(scope="module")
def case() -> tuple[Tensor, Tensor]:
    """A matrix, and the second moment of inputs whose features are strongly correlated and of different sizes."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(400, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    x = (common + torch.randn(400, 48, generator=generator)) * torch.logspace(-0.5, 0.5, 48)
    return torch.randn(40, 48, generator=generator), x.T @ x


def lost(weight: Tensor, kept: Tensor, moment: Tensor) -> float:
    error = (weight - kept).double()
    return float(((error @ moment.double()) * error).sum())


def refitted(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """The least error at given positions, by a system of equations for each row."""
    out = torch.zeros_like(weight)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    for row, keep in enumerate(mask):
        out[row, keep] = torch.linalg.solve(damped[keep][:, keep], (damped @ weight[row])[keep])
    return out


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_values_are_the_best_at_their_positions(case: tuple[Tensor, Tensor], density: float) -> None:
    weight, moment = case
    kept = keep_best(weight, moment, density)
    assert torch.count_nonzero(kept).item() == pytest.approx(density * weight.numel(), abs=1)
    best = lost(weight, refitted(weight, kept != 0, moment), moment)
    assert lost(weight, kept, moment) == pytest.approx(best, rel=5e-3)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_positions_are_better_than_the_largest(case: tuple[Tensor, Tensor], density: float) -> None:
    weight, moment = case
    kept = keep_best(weight, moment, density)
    costs = weight.abs() * moment.diagonal().sqrt()
    largest = costs > costs.flatten().kthvalue(round((1 - density) * weight.numel())).values
    assert lost(weight, kept, moment) < 0.9 * lost(weight, refitted(weight, largest, moment), moment)


def test_rounding_costs_little_and_drops_nothing(case: tuple[Tensor, Tensor]) -> None:
    weight, moment = case
    kept, codes = keep_best(weight, moment, 0.2), kept_codes(weight, moment, 0.2)
    assert torch.equal(codes.values != 0, kept != 0)
    assert lost(weight, codes.coefficients(), moment) < 1.2 * lost(weight, kept, moment)


def test_everything_and_nothing(case: tuple[Tensor, Tensor]) -> None:
    weight, moment = case
    torch.testing.assert_close(keep_best(weight, moment, 1.0), weight, rtol=1e-3, atol=1e-3)
    assert not kept_codes(torch.zeros_like(weight), moment, 0.2).values.any()


def test_a_transform_changes_nothing_about_outputs(case: tuple[Tensor, Tensor]) -> None:
    weight, moment = case
    basis = Basis("dct", 16)
    turned = in_domain(moment, basis)
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert lost(basis.forward(weight), basis.forward(other), turned) == pytest.approx(
        lost(weight, other, moment), rel=1e-4
    )
