"""x ΔWᵀ by FFTs of the activations equals the definition, with gradients, for every shape and place."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.adapters.fourierft import FourierFT, FourierFTConfig
from spectral_surgery.ops.fourier_delta import adapted_linear, delta_weight, fold, fourier_delta, reference

SHAPES = [(6, 8), (7, 5), (16, 16), (1, 9), (9, 1), (40, 24)]


def positions(shape: tuple[int, int], count: int, seed: int = 0) -> torch.Tensor:
    """Random places, with the constant, mirror pairs and the highest frequencies among them."""
    rows, columns = shape
    some = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count]
    mirrored = (-(some // columns) % rows) * columns + (-(some % columns) % columns)
    corner = torch.tensor([0, rows // 2 * columns + columns // 2])
    return torch.cat([some, mirrored, corner]).unique()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (300,)])
def test_outputs_and_gradients_are_those_of_the_definition(shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    places = positions(shape, 4)
    x = torch.randn(*leading, shape[1], dtype=torch.float64, generator=generator, requires_grad=True)
    c = torch.randn(len(places), dtype=torch.float64, generator=generator, requires_grad=True)
    up = torch.randn(*leading, shape[0], dtype=torch.float64, generator=generator)
    expected = reference.fourier_delta(x, c, places, shape[0], 3.0)
    found = fourier_delta(x, c, places, shape[0], 3.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad((expected * up).sum(), (x, c))
    torch.testing.assert_close(torch.autograd.grad((found * up).sum(), (x, c)), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_that_of_the_definition(shape: tuple[int, int]) -> None:
    places = positions(shape, 4)
    c = torch.randn(len(places), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(delta_weight(c, places, shape, 2.0), reference.delta_weight(c, places, shape, 2.0))


@pytest.mark.parametrize("tokens", [1, 7, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_with_its_update(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    shape, places = (48, 64), positions((48, 64), 30)
    x, weight, bias = (torch.randn(n, generator=generator).to(dtype) for n in ((tokens, 64), shape, (48,)))
    c = torch.randn(len(places), generator=generator)
    found = adapted_linear(x, weight, bias, c, fold(places, *shape), 50.0)
    dense = weight.double() + reference.delta_weight(c.double(), places, shape, 50.0)
    expected = (x.double() @ dense.T + bias.double()).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 8)


def test_merging_sees_float64() -> None:
    config = FourierFTConfig(n_frequency=50, scaling=30.0, init_weights=False)
    adapter = FourierFT(config, 40, 24).double()
    exact = reference.delta_weight(adapter.spectrum.detach(), adapter.positions, (40, 24), 30.0)
    torch.testing.assert_close(adapter.delta_weight().detach(), exact, rtol=1e-12, atol=1e-14)
    assert adapter.delta_weight().dtype == torch.float64
