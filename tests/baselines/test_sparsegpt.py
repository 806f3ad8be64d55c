"""SparseGPT is optimal brain surgery: beside a brute-force one, and better than what updates nothing."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.baselines.prune import prune
from spectral_surgery.baselines.sparsegpt import sparsegpt
from spectral_surgery.baselines.wanda import wanda
from spectral_surgery.codec.feedback import output_error


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8 * columns, columns // 4 + 1, generator=generator)
    x = hidden @ torch.randn(columns // 4 + 1, columns, generator=generator)
    x = x / columns**0.5 + 0.2 * torch.randn(x.shape, generator=generator)
    x *= torch.rand(columns, generator=generator) + 0.5
    return torch.randn(rows, columns, generator=generator), x.T @ x


def test_it_is_brute_force_surgery() -> None:
    weight, moment = problem(4, 12)
    own = sparsegpt(weight, moment, 9.0)  # 6 bytes of bitmap, 24 weights
    hessian = moment.double() + 0.01 * moment.diagonal().double().mean() * torch.eye(12, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(12)]  # of the columns that are left
    price = weight.double().square() / torch.stack([inverse[0, 0] for inverse in inverses])
    keep = torch.zeros(48, dtype=torch.bool)
    keep[price.flatten().argsort(descending=True)[:24]] = True
    keep, rest = keep.reshape(4, 12), weight.double()
    for column, inverse in enumerate(inverses):
        left = torch.where(keep[:, column], rest[:, column].bfloat16().double(), 0)
        error = rest[:, column] - left
        rest[:, column:] -= error[:, None] / inverse[0, 0] * inverse[0]
        rest[:, column] = left
    torch.testing.assert_close(own.weight.double(), rest, rtol=1e-2, atol=1e-5)  # bfloat16 at a tie
    assert own.stored_bytes == 6 + 2 * 24


def test_the_last_weight_makes_up_for_the_others_as_least_squares_does() -> None:
    weight, moment = torch.tensor([[0.1, 0.2, 5.0]]), torch.tensor([[2.0, 1.0, 0.5], [1.0, 3.0, 1.0], [0.5, 1.0, 2.0]])
    own = sparsegpt(weight, moment, 8.0)  # a byte of bitmap, one weight
    best = 5.0 + (0.1 * 0.5 + 0.2 * 1.0) / (2.0 + 0.01 * 7 / 3)
    assert own.weight.tolist() == [[0, 0, pytest.approx(best, rel=4e-3)]]


@pytest.mark.parametrize("bits", [2.0, 4.0, 9.0])
def test_outputs_are_better_than_those_of_wanda_and_of_magnitude(bits: int) -> None:
    weight, moment = problem(64, 300)  # three blocks, the last one shorter
    made = [sparsegpt(weight, moment, bits), wanda(weight, moment, bits), prune(weight, bits)]
    errors = [output_error(weight, own.weight, moment) for own in made]
    assert len({own.stored_bytes for own in made}) == 1
    assert errors[0] < 0.95 * errors[1]
    assert errors[1] < 0.99 * errors[2]
