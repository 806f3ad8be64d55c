"""Vectors trained as they will be stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_surgery.errors import TargetError
from spectral_surgery.layers.rounded import Rounded
from spectral_surgery.live.trained_spectra import train_vectors, trained_vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_vector_has_numbers_of_the_dtype_only(dtype: torch.dtype) -> None:
    vector = torch.randn(50, generator=torch.Generator().manual_seed(0))
    rounded = Rounded(vector, dtype)
    values = rounded.right_inverse(vector).requires_grad_()
    now = rounded(values)
    assert torch.equal(now, rounded.stored(values).float())
    torch.testing.assert_close(now, vector, rtol=1e-2, atol=1e-6)
    toward = torch.arange(50.0)
    (now * toward).sum().backward()
    unit = vector.square().mean().sqrt() / 5
    torch.testing.assert_close(values.grad, toward * unit)  # as if nothing was rounded


def test_vectors_of_a_model_are_trained_and_found_again() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).requires_grad_(requires_grad=False)
    train_vectors(model, {"0.bias": torch.float32, "1.weight": torch.bfloat16, "1.bias": torch.float32})
    trained = [own for own in model.parameters() if own.requires_grad]
    assert len(trained) == 3
    optimizer = torch.optim.Adam(trained, lr=0.02)
    before = trained_vectors(model)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    after = trained_vectors(model)
    assert {name: own.dtype for name, own in after.items()} == {
        "0.bias": torch.float32, "1.weight": torch.bfloat16, "1.bias": torch.float32
    }  # fmt: skip
    assert not any(torch.equal(before[name], after[name]) for name in after)
    # one step of a vector of ones is 0.02 of a fifth
    torch.testing.assert_close(after["1.bias"].abs(), torch.full((4,), 0.004))  # zeros count in fifths of one
    with pytest.raises(TargetError, match=r"expected parameters of Sequential, got '2\.bias'"):
        train_vectors(model, {"2.bias": torch.float32})
