"""Choosing a quantiser: estimates against brute force, goals met, requests out of range."""

from __future__ import annotations

import numpy as np
import pytest

from spectral_surgery.codec.quantizers.scalar import DeadZone, for_bits, for_density, for_error
from spectral_surgery.codec.rate import Magnitudes, Target
from spectral_surgery.errors import ConfigError

SAMPLE = np.random.default_rng(0).standard_normal(20_000)
MAGNITUDES = Magnitudes(SAMPLE)


@pytest.mark.parametrize("quantizer", [DeadZone(0.3, 0.5), DeadZone(1.28, 0.25), DeadZone(0.05, 0.1), DeadZone(2, 3)])
def test_estimate_is_exact(quantizer: DeadZone) -> None:
    levels = np.maximum(np.floor((np.abs(SAMPLE) - quantizer.dead_zone) / quantizer.step) + 1, 0).astype(int)
    codes = np.sign(SAMPLE).astype(int) * levels
    lost = sum(
        float(np.square(np.abs(SAMPLE[levels == level]) - (level > 0) * np.abs(SAMPLE[levels == level]).mean()).sum())
        for level in np.unique(levels)
    )
    got = quantizer.estimate(MAGNITUDES)
    assert got.distortion == pytest.approx(lost / float(np.square(SAMPLE).sum()), rel=1e-9)
    # the estimate gives both signs the same probability
    p = np.unique(codes, return_counts=True)[1] / codes.size
    assert got.entropy == pytest.approx(float(-(p * np.log2(p)).sum()), abs=2e-3)


@pytest.mark.parametrize("bits", [0.7, 1, 2, 3, 4, 6, 8])
def test_bits(bits: float) -> None:
    assert for_bits(MAGNITUDES, bits).estimate(MAGNITUDES).entropy == pytest.approx(bits, rel=2e-3)


@pytest.mark.parametrize("error", [0.001, 0.02, 0.1, 0.3, 0.6])
def test_error(error: float) -> None:
    got = for_error(MAGNITUDES, error).estimate(MAGNITUDES)
    assert np.sqrt(got.distortion) == pytest.approx(error, rel=2e-3)
    assert got.entropy >= -np.log2(error)  # no scalar quantiser beats the bound


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_density(density: float) -> None:
    threshold = MAGNITUDES.quantile(density)
    assert np.mean(np.abs(SAMPLE) >= threshold) == pytest.approx(density, abs=1e-4)
    floor = np.sqrt(MAGNITUDES.dropped(threshold))
    got = np.sqrt(for_density(MAGNITUDES, threshold).estimate(MAGNITUDES).distortion)
    assert floor <= got <= max(1.0071 * floor, 0.0101)


def test_more_bits_less_error() -> None:
    errors = [for_bits(MAGNITUDES, bits).estimate(MAGNITUDES).distortion for bits in (1, 1.5, 2, 3, 4, 5, 6)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("density", 0.0, r"density 0: out of range; expected \(0, 1\]"),
        ("density", 1.1, "density 1.1"),
        ("bits", 0.4, r"bits 0.4: out of range; expected \[0.5, 8\]"),
        ("bits", 9, "bits 9"),
        ("max_error", 0.0, "max_error 0"),
        ("max_error", float("nan"), "max_error nan"),
        ("sparsity", 0.2, "target 'sparsity': unknown; expected density, bits, max_error"),
    ],
)
def test_requests_out_of_range(kind: str, value: float, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Target(kind, value)  # type: ignore[arg-type]


def test_zeros_are_dropped_even_where_everything_is_kept() -> None:
    sparse = Magnitudes(np.where(np.arange(SAMPLE.size) % 10, 0, SAMPLE))
    quantizer = for_density(sparse, sparse.quantile(0.5))
    assert sparse.quantile(0.5) == 0 < quantizer.dead_zone
    assert 0.009 < np.sqrt(quantizer.estimate(sparse).distortion) <= 0.01


def test_levels_too_many_to_price_one_by_one() -> None:
    far = Magnitudes(np.append(SAMPLE, [1e6, -3e5]))
    step = 0.01
    got = DeadZone(step / 2, step).estimate(far)
    energy = float(np.square(far.sorted).sum())
    assert got.distortion == pytest.approx(SAMPLE.size * step**2 / 12 / energy, rel=0.02)
    assert got.entropy == pytest.approx(DeadZone(step / 2, step).estimate(MAGNITUDES).entropy, abs=0.01)
