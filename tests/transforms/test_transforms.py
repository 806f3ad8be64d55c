"""The laws of every row of TRANSFORMS, and parity with definitions elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch

from spectral_surgery.errors import ConfigError, DomainError, ShapeError
from spectral_surgery.transforms import TRANSFORMS
from spectral_surgery.transforms.base import Transform

LENGTHS = (1, 2, 3, 8, 63, 64)
CASES = [pytest.param(t, n, id=f"{t.name}-{n}") for t in TRANSFORMS.values() for n in LENGTHS if t.accepts(n)]


def signal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("transform", "n"), CASES)
def test_laws(transform: Transform, n: int) -> None:
    x, y = signal(5, n), signal(5, n, seed=1)
    forward = transform.forward(x)
    torch.testing.assert_close(transform.inverse(forward), x)
    torch.testing.assert_close(forward.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close((forward * y).sum(), (x * transform.inverse(y)).sum())
    torch.testing.assert_close(transform.forward(2 * x - 3 * y), 2 * forward - 3 * transform.forward(y))
    basis = transform.matrix(n)
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(basis[0].square().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients(transform: Transform) -> None:
    x = signal(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(transform.forward, (x,))
    assert torch.autograd.gradcheck(transform.inverse, (x,))


@pytest.mark.parametrize("n", LENGTHS)
def test_dct_is_scipys(n: int) -> None:
    x = signal(3, n)
    expected = scipy.fft.dct(x.numpy(), type=2, norm="ortho")
    np.testing.assert_allclose(TRANSFORMS["dct"].forward(x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("n", LENGTHS)
def test_hartley_is_real_minus_imaginary_part_of_the_fft(n: int) -> None:
    x = signal(3, n)
    spectrum = torch.fft.fft(x, norm="ortho")
    torch.testing.assert_close(TRANSFORMS["hartley"].forward(x), spectrum.real - spectrum.imag)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_is_scipys(n: int) -> None:
    expected = scipy.linalg.hadamard(n) / np.sqrt(n)
    np.testing.assert_allclose(TRANSFORMS["hadamard"].matrix(n).numpy(), expected, atol=1e-12)


def test_haar_of_a_step_has_two_coefficients() -> None:
    step = torch.cat((torch.ones(8), -torch.ones(8)))
    coefficients = TRANSFORMS["haar"].forward(step)
    assert int((coefficients.abs() > 1e-6).sum()) == 1
    assert float(coefficients.abs().max()) == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_short_floats_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = signal(4, 64).to(dtype)
    got = TRANSFORMS["dct"].forward(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), TRANSFORMS["dct"].forward(x.double()), atol=1e-5, rtol=1e-5)


def test_errors() -> None:
    with pytest.raises(
        ConfigError, match=r"hadamard: expected a length that is a power of two, got 48. Use a length of 64"
    ):
        TRANSFORMS["hadamard"].forward(torch.zeros(2, 48))
    with pytest.raises(DomainError, match="complex"):
        TRANSFORMS["dct"].forward(torch.zeros(2, 4, dtype=torch.complex64))
    with pytest.raises(ShapeError, match="at least 1 dimension"):
        TRANSFORMS["dct"].forward(torch.tensor(1.0))
