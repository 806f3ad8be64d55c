"""Rates spread over tensors: the mean is met, slopes are equal where nothing is clipped, and costs are checked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.allocation import TensorCost, spread_bits, spread_density
from spectral_surgery.errors import ConfigError

SHARES = {"a": TensorCost(1000, 4.0), "b": TensorCost(3000, 1.0), "c": TensorCost(500, 0.01)}


def mean(rates: dict[str, float], shares: dict[str, TensorCost]) -> float:
    return sum(rates[name] * own.weights for name, own in shares.items()) / sum(own.weights for own in shares.values())


def test_slopes_are_equal_and_the_mean_is_met() -> None:
    rates = spread_bits(SHARES, 4.0)
    assert mean(rates, SHARES) == pytest.approx(4.0, abs=1e-9)
    slopes = [own.cost * 4.0 ** -rates[name] for name, own in SHARES.items()]
    assert slopes == pytest.approx([slopes[0]] * 3)
    assert rates["a"] - rates["b"] == pytest.approx(1.0)  # four times the cost is one more bit


def test_no_other_rates_of_the_same_mean_cost_less() -> None:
    def cost(rates: dict[str, float]) -> float:
        return sum(own.weights * own.cost * 4.0 ** -rates[name] for name, own in SHARES.items())

    rates = spread_bits(SHARES, 5.0)
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        for bit in (-0.1, 0.1):
            moved = dict(rates)
            moved[name] += bit / SHARES[name].weights * 500
            moved[other] -= bit / SHARES[other].weights * 500
            assert cost(moved) > cost(rates)


@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-30, 1e30)), min_size=1, max_size=6),
    st.floats(0.5, 8.0),
    st.floats(0.1, 10.0),
)
def test_rates_stay_in_range(numbers: list[tuple[int, float]], bits: float, reach: float) -> None:
    shares = {str(place): TensorCost(*own) for place, own in enumerate(numbers)}
    rates = spread_bits(shares, bits, reach)
    assert all(max(0.5, bits - reach) <= own <= min(8.0, bits + reach) for own in rates.values())
    assert mean(rates, shares) == pytest.approx(bits, abs=1e-6)


def test_densities_have_equal_slopes() -> None:
    rates = spread_density(SHARES, 0.2)
    assert mean(rates, SHARES) == pytest.approx(0.2, abs=1e-9)
    assert rates["a"] > rates["b"] > rates["c"]
    kept = spread_density({"a": TensorCost(7, 2.0), "b": TensorCost(9, 2.0)}, 0.3)
    assert kept == pytest.approx({"a": 0.3, "b": 0.3})
    near = spread_density(SHARES, 0.2, reach=2.0)
    assert all(0.1 <= own <= 0.4 for own in near.values())
    assert mean(near, SHARES) == pytest.approx(0.2, abs=1e-9)


@pytest.mark.parametrize("cost", [0.0, -1.0, math.inf, math.nan])
def test_costs_that_are_none(cost: float) -> None:
    with pytest.raises(ConfigError, match=r"tensor cost: expected positive finite numbers, got 5 weights at "):
        TensorCost(5, cost)
    with pytest.raises(ConfigError, match="got 0 weights"):
        TensorCost(0, 1.0)
