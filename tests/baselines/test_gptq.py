"""GPTQ as published: without correlations it is round-to-nearest, with them its outputs are better."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.baselines.gptq import gptq, group_grids
from spectral_surgery.baselines.rounding import int_groups
from spectral_surgery.codec.feedback import output_error


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("reorder", [False, True])
def test_inputs_that_are_not_correlated_give_round_to_nearest(bits: int, reorder: bool) -> None:
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    moment = torch.diag(torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.1)
    own = gptq(weight, moment, bits=bits, reorder=reorder, search=False)
    nearest = int_groups(weight, bits=bits, group=128)
    assert torch.equal(own.weight, nearest.weight)
    assert own.stored_bytes == nearest.stored_bytes


def correlated(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator).tril(-columns * 2 // 3).add(torch.eye(columns))
    x = torch.randn(900, columns, generator=generator) @ mixing
    return x.T @ x


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_outputs_are_better_where_inputs_are_correlated(bits: int, reorder: bool, search: bool) -> None:
    weight, moment = torch.randn(60, 128, generator=torch.Generator().manual_seed(0)), correlated(128)
    errors = [
        output_error(weight, own.weight, moment)
        for own in (
            gptq(weight, moment, bits=bits, reorder=reorder, search=search),
            int_groups(weight, bits=bits, group=128),
        )
    ]
    assert errors[0] < 0.9 * errors[1]


def test_columns_with_the_strongest_inputs_come_first_and_their_groups_stay() -> None:
    weight, moment = torch.randn(30, 256, generator=torch.Generator().manual_seed(0)), correlated(256)
    own = gptq(weight, moment, bits=3, search=False)
    order = moment.diagonal().argsort(descending=True)
    scale, zero = group_grids(weight, 7, 128, search=False)
    rest, inverse = weight.double()[:, order], torch.linalg.inv(damped(moment.double())[order][:, order])
    for column in range(256):  # by the definition: quantise one, make up for it in those that are left, remove it
        group = int(order[column]) // 128
        codes = (rest[:, column].float() / scale[:, group]).round().add(zero[:, group]).clamp(0, 7)
        rounded = (codes - zero[:, group]) * scale[:, group]
        error = (rest[:, column] - rounded) / inverse[0, 0]
        rest[:, column:] -= error[:, None] * inverse[0]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
        same = torch.isclose(own.weight[:, order[column]], rounded, atol=1e-5)
        if column < 20:
            assert bool(same.all())
    same = torch.isclose(own.weight[:, order].double(), rest, atol=1e-4)
    assert float(same.double().mean()) > 0.98  # a code at a tie falls either way in float32


def damped(moment: torch.Tensor) -> torch.Tensor:
    return moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def test_the_search_narrows_ranges_that_an_outlier_made_wide() -> None:
    weight = 0.1 * torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight[:, 5] = 1.0
    found = []
    for search in (False, True):
        scale, zero = (grid.repeat_interleave(128, 1) for grid in group_grids(weight, 3, 128, search=search))
        found.append((((weight / scale).round() + zero).clamp(0, 3) - zero) * scale - weight)
    assert bool((found[1].abs().pow(2.4).sum(1) < 0.9 * found[0].abs().pow(2.4).sum(1)).all())


def test_the_closed_form_of_two_columns() -> None:
    # the second column takes up the error of the first as least squares says: - e H12 / H22
    weight = torch.tensor([[0.30, 1.0], [-0.9, 0.2]])
    moment = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    own = gptq(weight, moment, bits=4, group=1, reorder=False, search=False)
    error = weight[:, 0] - own.weight[:, 0]
    wanted = weight[:, 1] + error * moment[0, 1] / damped(moment)[1, 1]
    torch.testing.assert_close(own.weight[:, 1], wanted, rtol=2e-3, atol=1e-3)  # a group of one is nearly exact
