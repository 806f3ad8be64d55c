"""Spreading a rate over tensors so that one more bit helps as much wherever it is spent.

A tensor of n weights that is coded at R bits costs n k 4^-R, with k what one of its weights would cost at no bits:
every bit halves the error. The sum over tensors is least for a given mean rate where all slopes are equal, at
R = log4(k) + constant, which is reverse waterfilling (Cover and Thomas, Elements of Information Theory, 10.3.3).
When a part of the coefficients is kept, the slope is k t², with t the threshold in units of the root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spectral_surgery.errors import ConfigError

_HALVINGS = 100
_MOST_BITS, _FEWEST_BITS = 8.0, 0.5  # what the codec can be asked for


@dataclass(frozen=True)
class TensorCost:
    """One tensor's share of the budget.

    Attributes:
        weights: number of them, n.
        cost: k, of one weight at no bits, positive; only ratios between tensors count.

    Raises:
        ConfigError: when one of them is not positive and finite.
    """

    weights: int
    cost: float

    def __post_init__(self) -> None:
        if self.weights < 1 or not 0 < self.cost < math.inf:
            raise ConfigError(
                f"tensor cost: expected positive finite numbers, got {self.weights} weights at {self.cost:g}."
            )


def spread_bits(shares: Mapping[str, TensorCost], bits: float, reach: float = math.inf) -> dict[str, float]:
    """Bits per weight of each tensor.

    Returns by name; within what the codec takes, and with the mean that was asked for.

    Args:
        shares: by name.
        bits: of all tensors together; no tensor is further from it than reach.
    """
    low, high = max(_FEWEST_BITS, bits - reach), min(_MOST_BITS, bits + reach)

    def at(level: float) -> dict[str, float]:
        return {name: min(max(level + math.log(share.cost, 4), low), high) for name, share in shares.items()}

    return _balanced(shares, bits, at)


def spread_density(shares: Mapping[str, TensorCost], density: float, reach: float = math.inf) -> dict[str, float]:
    """Fraction of the coefficients of each tensor to keep, taken to be Gaussian.

    Returns by name, with the mean that was asked for.

    Args:
        shares: by name.
        density: of all tensors together.
        reach: factor by which a tensor may be denser or sparser than that.
    """
    low, high = density / reach, min(1.0, density * reach)

    def at(level: float) -> dict[str, float]:
        kept = {name: math.erfc(2.0**-level / math.sqrt(2 * share.cost)) for name, share in shares.items()}
        return {name: min(max(rate, low), high) for name, rate in kept.items()}

    return _balanced(shares, density, at)


def _balanced(
    shares: Mapping[str, TensorCost], mean: float, at: Callable[[float], dict[str, float]]
) -> dict[str, float]:
    """The level, found by halving, at which the mean is as asked."""
    total = sum(share.weights for share in shares.values())
    low, high = -600.0, 600.0  # costs are powers of two between these, or all is clipped
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(rate * shares[name].weights for name, rate in at(middle).items()) > mean * total:
            high = middle
        else:
            low = middle
    return at((low + high) / 2)
