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
_ZERO = 1e-3  # in steps: a coefficient this small is a rounded zero, dropped even where everything is kept
_DEAD_ZONES = (0.5, 0.54, 0.58, 0.62, 0.66, 0.7)  # in steps; the wider ones pay off at low rates
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
            raise ConfigError(f"target '{self.kind}': unknown; {', '.join(_RANGES)} are accepted.")
        low, high = _RANGES[self.kind]
        inside = low <= self.value <= high and (self.kind != "density" or self.value > 0)
        if not inside:
            bracket = "(" if self.kind == "density" else "["
            raise ConfigError(f"{self.kind} {self.value:g}: out of range; {bracket}{low:g}, {high:g}] is accepted.")


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

    Args:
        sample: [n] coefficients of any sign, finite.
    """

    def __init__(self, sample: npt.NDArray[Any]) -> None:
        """Sort the sample once; everything else is look-ups."""
        self.sorted: Floats = np.sort(np.abs(sample.astype(np.float64).reshape(-1)))
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
        size = self.sorted.size
        levels = min(int(max(self.sorted[-1] - quantizer.dead_zone, 0.0) / quantizer.step) + 1, _MAX_LEVELS)
        edges = quantizer.dead_zone + quantizer.step * np.arange(levels + 1)
        cuts = np.searchsorted(self.sorted, edges)
        counts = np.diff(cuts)
        used = counts > 0
        sums, squares = np.diff(self._sum[cuts])[used], np.diff(self._square[cuts])[used]
        error = self._square[cuts[0]] + float((squares - sums**2 / counts[used]).sum())
        p = np.append(counts[used], cuts[0]) / size
        p = p[p > 0]
        beyond = size - cuts[-1]  # so far out that each has a level of its own
        error += beyond * quantizer.step**2 / 12
        entropy = float(-(p * np.log2(p)).sum() + beyond / size * np.log2(size))
        entropy += float(1 - cuts[0] / size)  # one more bit for every sign
        return Estimate(entropy, max(error, 0.0) / float(self._square[-1]))


def for_bits(magnitudes: Magnitudes, entropy: float) -> Quantizer:
    """Quantiser with the least error at a given entropy, in bits per coefficient."""
    candidates = [_solve(magnitudes, ratio, lambda e: e.entropy <= entropy) for ratio in _DEAD_ZONES]
    return min(candidates, key=lambda q: magnitudes.estimate(q).distortion)


def for_error(magnitudes: Magnitudes, relative_error: float) -> Quantizer:
    """Quantiser with the least entropy at a given relative error."""
    limit = relative_error**2
    candidates = [_solve(magnitudes, ratio, lambda e: e.distortion > limit) for ratio in _DEAD_ZONES]
    return min(candidates, key=lambda q: magnitudes.estimate(q).entropy)


def for_density(magnitudes: Magnitudes, threshold: float) -> Quantizer:
    """Widest step for coefficients at or above a threshold that adds at most 0.7 % to the error of the rest dropped."""
    limit = max(magnitudes.dropped(threshold) * _QUANTISATION_SHARE**2, _QUANTISATION_FLOOR**2)
    step = _bisect(magnitudes.rms, lambda s: magnitudes.estimate(Quantizer(threshold, s)).distortion > limit)
    return Quantizer(max(threshold, _ZERO * step), step)


def _solve(magnitudes: Magnitudes, ratio: float, too_coarse: Callable[[Estimate], bool]) -> Quantizer:
    step = _bisect(magnitudes.rms, lambda s: too_coarse(magnitudes.estimate(Quantizer(ratio * s, s))))
    return Quantizer(ratio * step, step)


def _bisect(rms: float, too_coarse: Callable[[float], bool]) -> float:
    low, high = np.log(rms * _FINEST), np.log(rms * _COARSEST)
    for _ in range(24):
        middle = (low + high) / 2
        if too_coarse(float(np.exp(middle))):
            high = middle
        else:
            low = middle
    return float(np.exp(low))
