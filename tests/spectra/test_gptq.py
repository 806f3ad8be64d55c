"""GPTQ as published: without correlations it is round-to-nearest, with them its outputs are better."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.errors import ShapeError
from spectral_surgery.spectra.baselines import int_groups
from spectral_surgery.spectra.feedback import output_error
from spectral_surgery.spectra.gptq import gptq


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inputs_that_are_not_correlated_give_round_to_nearest(bits: int) -> None:
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    own, nearest = gptq(weight, torch.eye(200), bits=bits), int_groups(weight, bits=bits, group=128)
    assert torch.equal(own.weight, nearest.weight)
    assert own.stored_bytes == nearest.stored_bytes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_better_where_inputs_are_correlated(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 128, generator=generator)
    x = torch.randn(900, 128, generator=generator) @ torch.randn(128, 128, generator=generator).tril(-90).add(
        torch.eye(128)
    )
    moment = x.T @ x
    errors = [
        output_error(weight, own.weight, moment)
        for own in (gptq(weight, moment, bits=bits), int_groups(weight, bits=bits, group=128))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_the_closed_form_of_two_columns() -> None:
    # the second column takes up the error of the first as least squares says: - e H12 / H22
    weight = torch.tensor([[0.30, 1.0], [-0.9, 0.2]])
    moment = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    own = gptq(weight, moment, bits=4, group=1)
    damped = moment + 0.01 * 2.5 * torch.eye(2)
    error = weight[:, 0] - own.weight[:, 0]
    wanted = weight[:, 1] + error * damped[0, 1] / damped[1, 1]
    torch.testing.assert_close(own.weight[:, 1], wanted, rtol=2e-3, atol=1e-3)  # a group of one is nearly exact


def test_a_moment_of_another_size_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"gptq: H is \(3, 3\); \(4, 4\) is accepted"):
        gptq(torch.randn(2, 4), torch.eye(3), bits=4)
