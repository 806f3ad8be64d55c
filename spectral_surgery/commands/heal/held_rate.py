"""The rate of a model that is trained in its kept spectrum, held where it was before training.

Training moves coefficients away from zero and from each other, and codes that are more even cost more bits. What is
small is then dropped: which coefficients become zero is the encoder's choice, and no format has to know.
"""

from __future__ import annotations

import math

from torch import nn

from spectral_surgery.live.trained_spectra import trained_weights

_WIDEST = 8.0  # times the usual dead zone; the search ends there
_HALVINGS = 10
_SAMPLE = 8 << 20  # weights that are looked at, about


class HeldRate:
    """Widens the dead zones of a model in training, so that its codes take no more bits than at the start."""

    def __init__(self, model: nn.Module) -> None:
        """Remember the rate of a model."""
        self._model = model
        counted = {id(values): math.prod(kept.shape) for kept, values in trained_weights(model)}
        self._every = max(1, sum(counted.values()) // _SAMPLE)
        self.bits = self._measure(1.0)

    def __call__(self) -> None:
        """Give all weights the one dead zone that holds the rate for the values they have now; none if none need it."""
        widths = 1.0, _WIDEST
        if self._measure(1.0) <= self.bits:
            widths = 1.0, 1.0
        while widths[1] - widths[0] > (_WIDEST - 1.0) / 2**_HALVINGS:
            middle = sum(widths) / 2
            widths = (middle, widths[1]) if self._measure(middle) > self.bits else (widths[0], middle)
        for kept, _ in trained_weights(self._model):
            kept.dead_zone = widths[1]

    def _measure(self, dead_zone: float) -> float:
        """Entropy, in bits, of all codes of each row range together; a shared weight counts once."""
        total, seen = 0.0, set[int]()
        for kept, values in trained_weights(self._model):
            if id(values) in seen:
                continue
            seen.add(id(values))
            total += kept.bits(values.detach(), dead_zone, self._every)
        return total
