"""What is asked of a spectrum, and what scalar quantisers would give.

Bits and error for any dead zone and step follow exactly from sorted magnitudes and their prefix sums, so choosing costs
milliseconds and no trial encoding. By Parseval the error on coefficients is the error on weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spectral_surgery.errors import ConfigError

Floats = npt.NDArray[np.float64]

_MAX_LEVELS = 4096  # priced one by one in the estimate
_RANGES = {"density": (0.0, 1.0), "bits": (0.5, 8.0), "max_error": (1e-4, 1.0), "lossless": (0.0, 0.0)}


@dataclass(frozen=True)
class Target:
    """What a spectrum is asked to be.

    Attributes:
        kind: ``density`` (fraction of coefficients kept), ``bits`` (stored bits per weight) or ``max_error`` (relative
            Frobenius error); ``lossless`` compresses nothing with a loss.
        value: the number asked for; 0 for ``lossless``.

    Raises:
        ConfigError: when the kind is unknown or the value out of its range.
    """

    kind: Literal["density", "bits", "max_error", "lossless"]
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
