"""Which coefficients of a weight a model needs most, and the codes of those that are kept.

Dropping a coefficient c costs about c² F, with F the curvature of the loss along it (Optimal Brain Damage, LeCun et
al., 1990), here in the domain of the codes. F is taken as a share of its row times one of its column: these are means
over many coefficients, which little text measures well. Where tensors share one threshold on that cost, coefficients
are spread over them so that one more helps as much wherever it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.codec.feedback import Codes
from spectral_surgery.errors import ConfigError

_DAMPING = 0.01  # of the mean: what the text never reached is not free
_OCTAVES, _BINS = 200, 256  # of costs either side of one; bins of an octave
_ROUNDING_SHARE = 0.025  # rounding may cost this part of what dropping costs...
_ROUNDING_FLOOR = 1e-4  # ...or of everything there is, where hardly anything is dropped


@dataclass(frozen=True)
class Importance:
    """The curvature of the loss along the coefficients of a matrix.

    Attributes:
        rows: [O] float32, non-negative.
        columns: [I] float32, non-negative; the curvature is the product of both.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of_squares(cls, rows: Tensor, columns: Tensor) -> Importance:
        """From means of squared gradients over each row, [O], and over each column, [I]; both have the same mean.

        Raises ConfigError when they are not finite, or all are zero.
        """
        mean = float(rows.double().mean())
        if not 0 < mean < math.inf:
            raise ConfigError(
                f"importance: squared gradients have a mean of {mean}; expected positive finite ones. Look for NaN or"
                " infinite weights."
            )
        damped = [(means.double() / mean + _DAMPING) / (1 + _DAMPING) for means in (rows, columns)]
        return cls((damped[0] * mean).float(), damped[1].float())

    def costs(self, coefficients: Tensor) -> Tensor:
        """Of dropping each of the coefficients: [O, I] float32 to the same."""
        return coefficients.square() * self.rows[:, None] * self.columns


@dataclass(frozen=True)
class Threshold:
    """What is kept of one or of several matrices.

    Attributes:
        threshold: costs from here on are kept.
        rounding: mean cost that rounding a kept coefficient may add.
    """

    threshold: float
    rounding: float

    def codes(self, coefficients: Tensor, importance: Importance) -> Codes:
        """Codes of a matrix: of what is kept, none of them zero. ``coefficients`` is [O, I] float32."""
        costs = importance.costs(coefficients)
        kept = (costs >= self.threshold) & (costs > 0)
        if not kept.any():
            return Codes(torch.zeros(coefficients.shape, dtype=torch.int32), 1.0)
        curvature = float((importance.rows[:, None] * importance.columns)[kept].double().mean())
        step = math.sqrt(12 * self.rounding / curvature)  # rounding leaves step²/12
        values = (coefficients.abs() / step).round().clamp_(min=1).copysign(coefficients)
        return Codes(torch.where(kept, values, 0.0).to(torch.int32), step)


def threshold_at(costs: Iterable[Tensor], density: float) -> Threshold:
    """Where to cut so that a fraction of all coefficients is kept, those that cost most.

    Args:
        costs: of the coefficients of matrices, non-negative; looked at once, one after the other.
        density: the fraction, in (0, 1]; it is met to a few ten-thousandths.
    """
    size = 2 * _OCTAVES * _BINS
    counts, sums = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for matrix in costs:
        flat = matrix.reshape(-1)
        place = (flat.log2().add_(_OCTAVES).mul_(_BINS)).nan_to_num_(neginf=0.0).clamp_(0, size - 1).long()
        counts += torch.bincount(place, minlength=size)
        sums += torch.bincount(place, weights=flat.double(), minlength=size)
    kept = counts.flip(0).cumsum(0).flip(0)
    lowest = int((kept >= density * kept[0]).nonzero()[-1])
    inside = float((kept[lowest] - density * kept[0]) / counts[lowest]) if counts[lowest] else 0.0
    threshold = 2.0 ** ((lowest + inside) / _BINS - _OCTAVES)
    dropped, everything = float(sums[:lowest].sum()), float(sums.sum())
    rounding = max(_ROUNDING_SHARE * dropped, _ROUNDING_FLOOR * everything) / (density * float(kept[0]))
    return Threshold(threshold if lowest else 0.0, rounding)
