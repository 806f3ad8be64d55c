"""Matrices of experts: each row of x is multiplied by the matrix of its own expert, and no other is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ShapeError
from spectral_surgery.layers import SpectralExperts, SpectralWeight


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoded(expert: int, rows: int = 40) -> EncodedSpectrum:
    return encode(0.02 * noise(rows, 24, seed=expert), Target("bits", 3.0))[0]


def experts(*, transposed: bool = False, resident: str = "int8") -> SpectralExperts:
    return SpectralExperts([SpectralWeight.from_spectra(encoded(n), resident) for n in range(3)], transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(2, 3, 1), (0, 6, 0), (6, 0, 0), (0, 0, 0)])
def test_each_row_meets_its_expert(counts: tuple[int, ...], transposed: bool) -> None:
    own = experts(transposed=transposed)
    dense = own.to_dense()
    assert own.shape == dense.shape == (3, 40, 24)
    x = noise(sum(counts), 40 if transposed else 24).requires_grad_()
    rows = zip(x.split(counts), dense, strict=True)
    expected = torch.cat([part @ (matrix if transposed else matrix.T) for part, matrix in rows])
    y = own(x, counts)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    if len(x):
        wanted = torch.autograd.grad(expected.square().sum(), x)[0]
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted, rtol=1e-4, atol=1e-5)


def test_experts_without_rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own, used = experts(resident="coded"), []
    matmul = SpectralWeight.matmul
    monkeypatch.setattr(SpectralWeight, "matmul", lambda self, x: used.append(self) or matmul(self, x))
    own(noise(4, 24), (0, 4, 0))
    assert used == [own.experts[1]]


def test_types_and_bytes() -> None:
    own = experts()
    assert own.half().dtype == torch.float16
    assert own(noise(2, 24).bfloat16(), (1, 1, 0)).dtype == torch.bfloat16
    assert own.nbytes == sum(weight.nbytes for weight in own.weights) < 1.1 * 3 * 40 * 24
    assert "3 experts of 40 x 24" in repr(own)


def test_bad_input() -> None:
    own = experts()
    with pytest.raises(ShapeError, match="experts: expected 3 counts that add up to 4 rows, got 2 that add up to 4"):
        own(noise(4, 24), (2, 2))
    with pytest.raises(ShapeError, match="experts: expected 3 counts that add up to 4 rows, got 3 that add up to 5"):
        own(noise(4, 24), (2, 2, 1))
    other = SpectralWeight.from_spectra(encoded(0, rows=8))
    with pytest.raises(
        ShapeError, match=r"experts: expected one or more of one shape, got 2 of shapes \[\(8, 24\), \(40, 24\)\]"
    ):
        SpectralExperts([own.weights[0], other])
    with pytest.raises(ShapeError, match="experts: expected one or more of one shape, got 0"):
        SpectralExperts([])
