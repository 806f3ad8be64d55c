"""Transforms by FFT against the matrices of the same names."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.errors import ConfigError, DomainError
from spectral_surgery.transforms import TRANSFORMS
from spectral_surgery.transforms.fast import FAST, FastTransform

LENGTHS = (1, 2, 3, 4, 5, 8, 63, 64, 1000)


def signal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transform", FAST.values(), ids=FAST)
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_the_matrix(transform: FastTransform, n: int) -> None:
    definition = TRANSFORMS[transform.name]
    x = signal(3, n)
    torch.testing.assert_close(transform.forward(x), definition.forward(x))
    torch.testing.assert_close(transform.inverse(x), definition.inverse(x))
    k = torch.arange(n)
    torch.testing.assert_close(transform.entries(k[:, None], k, n), definition.matrix(n))


@pytest.mark.parametrize("transform", FAST.values(), ids=FAST)
def test_both_axes(transform: FastTransform) -> None:
    x = signal(2, 5, 8)
    rows, columns = (TRANSFORMS[transform.name].matrix(n) for n in (5, 8))
    torch.testing.assert_close(transform.forward2(x), rows @ x @ columns.T)
    torch.testing.assert_close(transform.inverse2(transform.forward2(x)), x)


@pytest.mark.parametrize("transform", FAST.values(), ids=FAST)
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_gradients(transform: FastTransform, n: int) -> None:
    x = signal(2, n).requires_grad_()
    assert torch.autograd.gradcheck(transform.forward, (x,))
    assert torch.autograd.gradcheck(transform.inverse, (x,))


@pytest.mark.parametrize("transform", FAST.values(), ids=FAST)
def test_dtypes(transform: FastTransform) -> None:
    x = signal(3, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert transform.forward(x.to(dtype)).dtype == torch.float32
        assert transform.inverse(x.to(dtype)).dtype == torch.float32
    with pytest.raises(DomainError, match="complex128"):
        transform.forward(x.to(torch.complex128))


def test_a_long_axis_is_exact() -> None:
    n = 50_000
    impulse = torch.zeros(n)
    impulse[n - 3] = 1
    expected = FAST["dct"].entries(torch.arange(n), torch.tensor(n - 3), n).float()
    torch.testing.assert_close(FAST["dct"].forward(impulse), expected, rtol=0, atol=1e-7)


def test_use_in_inference_mode_leaves_training_possible() -> None:
    with torch.inference_mode():
        FAST["dct"].forward(torch.ones(37))
    x = torch.ones(37, requires_grad=True)
    FAST["dct"].forward(x).sum().backward()
    assert x.grad is not None


def test_unknown() -> None:
    with pytest.raises(ConfigError, match="transform: expected one of dct, hartley, got 'dft'"):
        FAST["dft"]
