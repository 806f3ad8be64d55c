"""Codes to coefficients and back to rows, against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_surgery.codec.quantized import (
    INT8_MAX,
    INT12_MAX,
    Moments,
    QuantizedSpectrum,
    dequantize,
    grid,
)
from spectral_surgery.codec.quantizers.scalar import DeadZone
from spectral_surgery.errors import ShapeError
from spectral_surgery.transforms import TRANSFORMS

STEP, OFFSET = 0.25, -0.125
ANY = DeadZone(0.5, 1.0)  # what it fits depends on the moments alone


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def scalar_code(c: float, quantizer: DeadZone) -> int:
    if abs(c) < quantizer.dead_zone:
        return 0
    return int(math.copysign(1 + math.floor((abs(c) - quantizer.dead_zone) / quantizer.step), c))


@pytest.mark.parametrize("quantizer", [DeadZone(0.125, 0.25), DeadZone(1.5, 0.5), DeadZone(0.25, 0.0625)])
def test_quantize_and_back_is_the_formula(quantizer: DeadZone) -> None:
    x = gaussian(37, 21)
    x[0, :4] = torch.tensor([0.0, -0.0, quantizer.dead_zone, -quantizer.dead_zone])
    codes, moments = quantizer.quantize(x)
    expected = [scalar_code(c, quantizer) for c in x.reshape(-1).tolist()]
    assert codes.reshape(-1).tolist() == expected
    values = [math.copysign(abs(q) + OFFSET, q) * STEP if q else 0.0 for q in expected]
    assert dequantize(codes, torch.tensor([STEP]), OFFSET).reshape(-1).tolist() == values
    assert moments.energy(STEP, OFFSET) == pytest.approx(sum(v * v for v in values), rel=1e-5)
    parts = quantizer.quantize(x[:10])[1] + quantizer.quantize(x[10:])[1]
    assert vars(parts) == pytest.approx(vars(moments), rel=1e-5)


@pytest.mark.parametrize(
    ("peak", "dtype"), [(120.0, torch.int8), (126.0, torch.int16), (32_000.0, torch.int16), (33_000.0, torch.int32)]
)
def test_the_narrowest_code_type_that_holds_the_peak(peak: float, dtype: torch.dtype) -> None:
    quantizer = DeadZone(0.5, 1.0)
    codes, _ = quantizer.quantize(torch.tensor([[peak]]))
    assert codes.dtype == dtype
    assert int(codes) == scalar_code(peak, quantizer)


@pytest.mark.parametrize("name", list(TRANSFORMS))
@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,), ()])
@pytest.mark.parametrize("columns", [67, 64])
def test_rows_equal_the_whole(name: str, axes: tuple[int, ...], columns: int) -> None:
    codes = (3 * gaussian(83, columns)).to(torch.int8)
    step = torch.linspace(0.5, 2, columns) if columns == 67 else torch.tensor([0.5])
    spectrum = QuantizedSpectrum(codes, step, OFFSET, name, 16, axes)
    dense = spectrum.to_dense()
    assert spectrum.shape == dense.shape == (83, columns)
    for start, stop in ((0, 0), (0, 1), (15, 17), (16, 32), (7, 81), (79, 83), (83, 83), (0, 83)):
        torch.testing.assert_close(spectrum.rows(start, stop), dense[start:stop])
    assert spectrum.to_dense(torch.bfloat16).dtype == spectrum.rows(3, 5, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_rows_outside(start: int, stop: int) -> None:
    spectrum = QuantizedSpectrum(torch.zeros(10, 4, dtype=torch.int8), torch.ones(1), 0.0, "dct", 4, (0, 1))
    with pytest.raises(ShapeError, match=rf"rows: {start}:{stop} of 10 rows; expected 0 <= start <= stop <= rows"):
        spectrum.rows(start, stop)


@pytest.mark.parametrize("dead_zone", [0.3, 0.5, 1.0, 1.28])
@pytest.mark.parametrize("step", [0.25, 0.5, 1.0, 2.0])
def test_reconstruction_is_nearly_as_good_as_centroids(dead_zone: float, step: float) -> None:
    x = gaussian(512, 512)
    quantizer = DeadZone(dead_zone, step)
    codes, moments = quantizer.quantize(x)
    largest = int(codes.abs().max())
    fitted, offset = quantizer.reconstruction(moments, largest)

    def error_of(points: list[float]) -> float:
        values = torch.tensor([0.0, *points])[codes.abs().int()]
        return float((x.abs() - values).norm() / x.norm())

    levels = range(1, largest + 1)
    level = codes.abs()
    centroids = error_of([float(x[level == q].abs().mean()) if (level == q).any() else 0.0 for q in levels])
    got = error_of([(q + offset) * fitted for q in levels])
    assert centroids <= got * (1 + 1e-6)
    assert got <= 1.005 * centroids
    for shift in (0.0, 0.5):  # edges and midpoints of the levels
        assert got <= error_of([dead_zone + (q - 1 + shift) * step for q in levels])


@given(st.integers(1, 200), st.floats(-0.6, 3.0), st.floats(1e-3, 1e3))
def test_offsets_are_on_a_grid_of_8_or_12_bits(largest: int, offset: float, step: float) -> None:
    levels = torch.arange(1, largest + 1, dtype=torch.float64)
    points = (levels + offset) * step
    moments = Moments(
        float(largest),
        float(levels.sum()),
        float(levels.square().sum()),
        float((levels * points).sum()),
        float(points.sum()),
    )
    _, got = ANY.reconstruction(moments, largest)
    most = INT8_MAX if largest <= INT8_MAX else INT12_MAX
    fine = grid(largest, got, most)
    on_grid = (levels + float(torch.tensor(got))) * fine  # stored as float32
    torch.testing.assert_close(on_grid, on_grid.round(), rtol=0, atol=1e-3)
    assert float(on_grid.max()) <= most + 1e-3
    if most == INT12_MAX:
        assert got == pytest.approx(max(offset, -0.5), abs=0.5 / fine + 1e-6)


def test_reconstruction_without_anything_to_fit() -> None:
    assert ANY.reconstruction(Moments(0, 0, 0, 0, 0), 0) == (1.0, 0.0)
    n = 1 << 20
    x = torch.full((n // 64, 64), 0.37)  # one level: any line through it will do
    codes, moments = DeadZone(0.001, 0.0037).quantize(x)
    step, offset = ANY.reconstruction(moments, int(codes.max()))
    assert offset == 0
    torch.testing.assert_close(dequantize(codes, torch.tensor([step]), offset), x, rtol=1e-4, atol=0)
