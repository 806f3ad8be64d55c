"""From a request (density, bits or error) to a quantiser (dead zone, step).

A quantiser turns a coefficient c into an integer code: 0 below the dead zone, else
``sign(c) * (1 + floor((|c| - dead_zone) / step))``. Bits and error for any (dead zone, step) follow exactly from
sorted magnitudes and their prefix sums, so choosing costs milliseconds and no trial encoding. By Parseval the error
on coefficients is the error on weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spectral_surgery.errors import ConfigError

Floats = npt.NDArray[np.float64]

_MAX_LEVELS = 4096  # priced one by one in the estimate
_FINEST, _COARSEST = 1e-4, 20.0  # steps considered, in units of the root mean square
_HALVINGS = 20  # of that range, to a hundred-thousandth of a step
_ZERO = 1e-3  # in steps: a coefficient this small is a rounded zero, dropped even where everything is kept
_DEAD_ZONES = np.array([0.5, 0.54, 0.58, 0.62, 0.66, 0.7])  # in steps; the wider ones pay off at low rates
_QUANTISATION_SHARE = 1.007  # keeping a fraction: rounding may add 0.7 % to the error of what is dropped...
_QUANTISATION_FLOOR = 0.01  # ...or leave one percent of error in all, where hardly anything is dropped
_RANGES = {"density": (0.0, 1.0), "bits": (0.5, 8.0), "max_error": (1e-4, 1.0)}


@dataclass(frozen=True)
class Target:
    """What a spectrum is asked to be.

    Attributes:
        kind: ``density`` (fraction of coefficients kept), ``bits`` (stored bits per weight) or ``max_error`` (relative
            Frobenius error).
        value: the number asked for.

    Raises:
        ConfigError: when the kind is unknown or the value out of its range.
    """

    kind: Literal["density", "bits", "max_error"]
    value: float

    def __post_init__(self) -> None:
        if self.kind not in _RANGES:
            raise ConfigError(f"target '{self.kind}': unknown; expected {', '.join(_RANGES)}.")
        low, high = _RANGES[self.kind]
        inside = low <= self.value <= high and (self.kind != "density" or self.value > 0)
        if not inside:
            bracket = "(" if self.kind == "density" else "["
            raise ConfigError(f"{self.kind} {self.value:g}: out of range; expected {bracket}{low:g}, {high:g}].")


@dataclass(frozen=True)
class Quantizer:
    """Dead zone and step, both in units of the coefficients; see the module docstring."""

    dead_zone: float
    step: float


@dataclass(frozen=True)
class Estimate:
    """What a quantiser would give: order-0 entropy in bits per coefficient, and squared error over energy."""

    entropy: float
    distortion: float


class Magnitudes:
    """Sorted magnitudes of a spectrum (or of a fair sample of it), ready to price any quantiser.

    ``sample`` is [n] coefficients of any sign, finite.
    """

    def __init__(self, sample: npt.NDArray[Any]) -> None:
        self.sorted: Floats = np.sort(np.abs(sample.reshape(-1))).astype(np.float64)
        zero = np.zeros(1)
        self._sum = np.concatenate((zero, np.cumsum(self.sorted)))
        self._square = np.concatenate((zero, np.cumsum(np.square(self.sorted))))
        self.rms = float(np.sqrt(self._square[-1] / max(self.sorted.size, 1)))

    def quantile(self, density: float) -> float:
        """Magnitude that ``density`` of all coefficients reach or exceed."""
        kept = round(density * self.sorted.size)
        return float(self.sorted[min(max(self.sorted.size - kept, 0), self.sorted.size - 1)])

    def dropped(self, threshold: float) -> float:
        """Share of the energy below a threshold."""
        return float(self._square[np.searchsorted(self.sorted, threshold)] / self._square[-1])

    def estimate(self, quantizer: Quantizer) -> Estimate:
        """Entropy and error of a quantiser, with every level reconstructed at its centroid."""
        entropy, distortion = self.estimates(np.array([quantizer.dead_zone]), np.array([quantizer.step]))
        return Estimate(float(entropy[0]), float(distortion[0]))

    def estimates(self, dead_zones: Floats, steps: Floats) -> tuple[Floats, Floats]:
        """Entropy and distortion of several quantisers at once: [n] dead zones and [n] steps to [n] and [n]."""
        size = self.sorted.size
        levels = int(min(max(((self.sorted[-1] - dead_zones) / steps).max(), 0.0) + 1, _MAX_LEVELS))
        edges = dead_zones[:, None] + steps[:, None] * np.arange(levels + 1)
        cuts = np.searchsorted(self.sorted, edges)
        counts = np.diff(cuts)
        sums, squares = np.diff(self._sum[cuts]), np.diff(self._square[cuts])
        beyond = size - cuts[:, -1]  # so far out that each has a level of its own
        error = self._square[cuts[:, 0]] + (squares - sums**2 / np.maximum(counts, 1)).sum(1) + beyond * steps**2 / 12
        p = np.concatenate((cuts[:, :1], counts), axis=1) / size
        entropy = -(p * np.log2(np.where(p > 0, p, 1))).sum(1) + beyond / size * np.log2(size)
        entropy += 1 - p[:, 0]  # one more bit for every sign
        return entropy, np.maximum(error, 0.0) / self._square[-1]


def for_bits(magnitudes: Magnitudes, entropy: float, near: Quantizer | None = None) -> Quantizer:
    """Quantiser with the least error at a given entropy.

    Args:
        entropy: bits per coefficient.
        near: the quantiser for an entropy that differs by a few percent, whose dead zone in steps is then taken over.
    """
    ratios = _DEAD_ZONES if near is None else np.array([near.dead_zone / near.step])
    steps = _steps(magnitudes, lambda s: ratios * s, lambda found, _: found <= entropy, len(ratios))
    _, distortion = magnitudes.estimates(ratios * steps, steps)
    return _quantizer(ratios, steps, int(distortion.argmin()))


def for_error(magnitudes: Magnitudes, relative_error: float) -> Quantizer:
    """Quantiser with the least entropy at a given relative error."""
    limit, ratios = relative_error**2, _DEAD_ZONES
    steps = _steps(magnitudes, lambda s: ratios * s, lambda _, distortion: distortion > limit, len(ratios))
    entropy, _ = magnitudes.estimates(ratios * steps, steps)
    return _quantizer(ratios, steps, int(entropy.argmin()))


def for_density(magnitudes: Magnitudes, threshold: float) -> Quantizer:
    """Widest step for coefficients at or above a threshold that adds at most 0.7 % to the error of the rest dropped."""
    limit = max(magnitudes.dropped(threshold) * _QUANTISATION_SHARE**2, _QUANTISATION_FLOOR**2)
    fixed = np.array([threshold])
    step = float(_steps(magnitudes, lambda _: fixed, lambda _, distortion: distortion > limit, 1)[0])
    return Quantizer(max(threshold, _ZERO * step), step)


def _quantizer(ratios: Floats, steps: Floats, which: int) -> Quantizer:
    step = float(steps[which])
    return Quantizer(float(ratios[which]) * step, step)


def _steps(
    magnitudes: Magnitudes,
    dead_zones: Callable[[Floats], Floats],
    too_coarse: Callable[[Floats, Floats], npt.NDArray[np.bool_]],
    count: int,
) -> Floats:
    """For each of ``count`` dead zones the widest step that is not too coarse by its entropy and distortion."""
    low = np.full(count, np.log(magnitudes.rms * _FINEST))
    high = np.full(count, np.log(magnitudes.rms * _COARSEST))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        steps = np.exp(middle)
        coarse = too_coarse(*magnitudes.estimates(dead_zones(steps), steps))
        low, high = np.where(coarse, low, middle), np.where(coarse, middle, high)
    widest: Floats = np.exp(low)
    return widest
