"""The transform of the kernel is that of numpy, for all lengths; so is the residual of a row beside the plain way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral_surgery.fourier import adapted_linear, fold, one_row, reference
from spectral_surgery.kernels.fourier import transform
from tests.support.spectra import noise, relative

LENGTHS = (1, 2, 3, 4, 5, 8, 9, 12, 15, 16, 30, 49, 64, 86, 94, 97, 128, 143, 194)  # 97 has no radix, and 2 x 97


@pytest.mark.parametrize("radices", [[], [2], [4], [2, 4], [4, 2, 3], [3, 3], [5, 7], [4, 4, 4], [2, 11, 2]])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("sign", [-1, 1])
def test_transform(radices: list[int], step: int, sign: int) -> None:
    length = int(np.prod(radices, dtype=int))
    angles = np.arange(step * length) * (sign * 2 * np.pi / (step * length))
    x = noise(2, length).numpy()
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    re, im = transform(x[0].copy(), x[1].copy(), cosines, sines, np.array(radices, np.int64))
    complex_x = x[0] + 1j * x[1]
    expected = np.fft.fft(complex_x) if sign < 0 else np.fft.ifft(complex_x) * length
    np.testing.assert_allclose(re + 1j * im, expected, rtol=0, atol=1e-5 * np.linalg.norm(expected))


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("columns", LENGTHS)
def test_residual_of_all_lengths(rows: int, columns: int) -> None:
    """With all coefficients, so that those that are their own mirror images are among them."""
    count = rows * columns
    places = fold(torch.arange(count), rows, columns)
    x, c = noise(columns), noise(count, seed=1)
    found, y = noise(rows, seed=2), noise(rows, seed=2)
    assert one_row.add_row(found, x, c, places, 0.5)
    plain = y + torch.from_numpy(one_row.plain_residual(x.numpy(), c.numpy(), places, rows, 0.5))
    assert float((found - plain).norm()) < 2e-6 * float(c.norm() * x.norm() + y.norm())  # outputs may cancel


def test_zero_frequency_alone() -> None:
    places, c, x = fold(torch.zeros(1, dtype=torch.long), 12, 20), torch.tensor([3.0]), noise(20)
    y = torch.zeros(12)
    assert one_row.add_row(y, x, c, places, 0.5)
    torch.testing.assert_close(y, (1.5 * x.sum()).expand(12))


def test_modes() -> None:
    """Inference mode takes the kernel, autocast and gradients do not; all give the same."""
    places, weight, c = fold(torch.arange(5, 200, 7), 12, 20), noise(12, 20), noise(28, seed=1).requires_grad_()
    x = noise(1, 20)
    delta = reference.delta_weight(c.detach(), torch.arange(5, 200, 7), (12, 20), 7.0)
    expected = x @ (weight + delta).T
    with torch.inference_mode():
        alone = adapted_linear(x, weight, None, c, places, 7.0)
    with torch.no_grad():
        again = adapted_linear(x, weight, None, c, places, 7.0)
    y = adapted_linear(x, weight, None, c, places, 7.0)
    assert y.requires_grad
    for one in (alone, again, y.detach()):
        assert relative(one, expected) < 2e-6
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative(adapted_linear(x, weight, None, c, places, 7.0).float(), expected) < 2e-2
