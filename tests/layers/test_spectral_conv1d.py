"""SpectralConv1D is GPT-2's Conv1D, from a live module or from the spectrum of its transposed weight in a file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.layers import SpectralConv1D
from spectral_surgery.matmul import RESIDENTS


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


class Conv1D(nn.Module):
    """What transformers' Conv1D is: y = x V + b."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(0.02 * noise(nx, nf))
        self.bias = nn.Parameter(noise(nf))


@pytest.mark.parametrize("resident", RESIDENTS)
def test_from_a_live_module(resident: str) -> None:
    conv = Conv1D(200, 70)
    layer = SpectralConv1D.from_dense(conv, bits=2, resident=resident)
    assert (layer.nx, layer.nf, layer.in_features, layer.out_features) == (70, 200, 70, 200)
    assert layer.weight.shape == conv.weight.shape
    assert 0.1 < relative(layer.weight, conv.weight) < 0.4
    x = noise(2, 5, 70)
    expected = x @ layer.weight + conv.bias
    assert relative(layer(x), expected) < 1e-5
    assert relative(layer.to_dense()(x), expected) < 1e-5
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative(y, expected) < 1e-2
    assert "nx=70, nf=200, bits_per_weight=" in repr(layer)


@pytest.mark.parametrize("resident", RESIDENTS)
@pytest.mark.parametrize("rows", [(70,), (64, 6), (64, 32, 6), (50, 20)])
def test_from_the_spectrum_of_the_stored_weight(resident: str, rows: tuple[int, ...]) -> None:
    parts = [encode(noise(count, 200, seed=count), Target("bits", 2.0), Basis(tile=32))[0] for count in rows]
    stored = torch.cat([part.to_dense() for part in parts])
    layer = SpectralConv1D.from_quantized(parts, noise(200), resident)
    torch.testing.assert_close(layer.weight, stored)
    x = noise(3, sum(rows)).requires_grad_()
    assert relative(layer(x), x @ stored + noise(200)) < 1e-5
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    dense = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad((dense @ stored + noise(200)).square().sum(), dense)
    assert relative(gradient, expected) < 1e-5
    assert layer.transposed == (resident == "int8" and rows != (50, 20))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"SpectralConv1D: expected.*got Linear without nf and weight"):
        SpectralConv1D.from_dense(nn.Linear(3, 4), bits=4)
    spectrum, _ = encode(noise(32, 64), Target("bits", 4.0))
    with pytest.raises(ShapeError, match=r"bias: expected \(64,\), got \(32,\)"):
        SpectralConv1D.from_quantized(spectrum, noise(32))
