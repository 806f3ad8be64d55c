"""The parts of FFTNet, each alone."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.mixers import AdaptiveSpectralFilter, FourierTransform, InverseFourierTransform, ModReLU
from spectral_surgery.mixers.components import interpolate
from tests.mixers.cases import tokens


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_transform_and_inverse(length: int) -> None:
    x = tokens(2, length, 3)
    spectrum = FourierTransform()(x)
    assert spectrum.shape == (2, length // 2 + 1, 3)
    assert spectrum.dtype == torch.complex64
    torch.testing.assert_close(InverseFourierTransform()(spectrum, length), x, rtol=0, atol=1e-6)
    twice = torch.full((length // 2 + 1, 1), 2.0)  # bins that stand for two, all but zero and Nyquist
    twice[0] = 1
    if length % 2 == 0:
        twice[-1] = 1
    torch.testing.assert_close((twice * spectrum.abs() ** 2).sum(), x.square().sum())
    assert FourierTransform()(x.bfloat16()).dtype == torch.complex64
    assert FourierTransform()(x.double()).dtype == torch.complex128


def test_modrelu() -> None:
    z = torch.view_as_complex(tokens(2, 9, 4, 2))
    assert torch.equal(ModReLU(2, 5, bias=0)(z, 16), z)
    activation = ModReLU(2, 5, bias=-0.5)
    torch.testing.assert_close(activation(z, 16), torch.relu(z.abs() - 0.5) * z / z.abs())
    assert (activation(z, 16) == 0).any()
    with torch.no_grad():
        activation.bias[1] = 3.0
    torch.testing.assert_close(activation(z, 16)[..., 2:], ((z.abs() + 3) * z / z.abs())[..., 2:])
    with pytest.raises(ConfigError, match="heads: expected 1 or more, got 0"):
        ModReLU(0, 5)
    with pytest.raises(ConfigError, match="bins: expected 2 or more, got 1"):
        ModReLU(1, 1)


def test_modrelu_gradients_are_finite_at_zero() -> None:
    z = torch.zeros(1, 5, 2, dtype=torch.complex64, requires_grad=True)
    activation = ModReLU(2, 5, bias=0.1)
    activation(z, 8).abs().sum().backward()
    assert z.grad is not None
    assert torch.isfinite(torch.view_as_real(z.grad)).all()
    assert torch.isfinite(activation.bias.grad).all()


def test_gains_vary_over_frequency_head_and_sequence() -> None:
    module = AdaptiveSpectralFilter(width=8, heads=2, bins=9, hidden=4, init_std=0.5)
    context, spectrum = tokens(2, 8), torch.view_as_complex(tokens(2, 9, 8, 2))
    torch.testing.assert_close(module.gain(context, 16), torch.view_as_complex(module.filter).T.expand(2, 9, 2))
    with torch.no_grad():
        torch.nn.init.normal_(module.down.weight)
    gain = module.gain(context, 16)
    for dim in range(3):
        assert gain.std(dim).min() > 0
    change = torch.view_as_real(gain) - module.filter.transpose(0, 1)
    assert change.abs().max() <= 1  # bounded by tanh
    wanted = spectrum * gain.repeat_interleave(4, -1)
    torch.testing.assert_close(module(spectrum, context, 16), wanted)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 31, 100])
def test_interpolation(length: int) -> None:
    bins = torch.linspace(0, 1, 9)  # the frequency itself, in Nyquists
    got = interpolate(bins[:, None], length, 0)[:, 0]
    torch.testing.assert_close(got, torch.arange(length // 2 + 1) * 2 / length)
    assert torch.equal(interpolate(torch.ones(3, 9, 2), length, -2), torch.ones(3, length // 2 + 1, 2))
    values = tokens(9, 2)
    assert torch.equal(interpolate(values, 16, 0), values)
    with pytest.raises(ShapeError, match="interpolate: expected at least 2 bins, got 1"):
        interpolate(torch.ones(1), length, 0)
