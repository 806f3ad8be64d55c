"""Every coefficient by itself: a dead zone around zero, and equal steps beyond it.

A coefficient c becomes 0 below the dead zone, else ``sign(c) * (1 + floor((|c| - dead_zone) / step))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.codec.quantized import INT8_MAX, INT12_MAX, Moments, grid
from spectral_surgery.codec.rate import Estimate, Floats, Magnitudes
from spectral_surgery.codec.sample import Sample

EXACT = 1e-4  # an error that is small enough, whatever bits are left

_CACHED = 1 << 18  # numbers worked on at a time: they stay in cache
_SUMMED = 1 << 16  # numbers multiplied at a time: they stay in cache
_FINEST, _COARSEST = 1e-4, 20.0  # steps considered, in units of the root mean square
_HALVINGS = 20  # of that range, to a hundred-thousandth of a step
_ZERO = 1e-3  # in steps: a coefficient this small is a rounded zero, dropped even where everything is kept
_DEAD_ZONES = np.array([0.5, 0.54, 0.58, 0.62, 0.66, 0.7])  # in steps; the wider ones pay off at low rates
_QUANTISATION_SHARE = 1.007  # keeping a fraction: rounding may add 0.7 % to the error of what is dropped...
_FEW_PARTS = 4  # of a step, for offsets where single codes are too large for any grid
_QUANTISATION_FLOOR = 0.01  # ...or leave one percent of error in all, where hardly anything is dropped


@dataclass(frozen=True)
class DeadZone:
    """A scalar quantiser.

    Attributes:
        dead_zone: magnitudes below it become zero, in units of the coefficients.
        step: in units of the coefficients.
    """

    dead_zone: float
    step: float

    def estimate(self, magnitudes: Magnitudes) -> Estimate:
        """Entropy and error, with every level reconstructed at its centroid."""
        entropy, distortion = magnitudes.estimates(np.array([self.dead_zone]), np.array([self.step]))
        return Estimate(float(entropy[0]), float(distortion[0]))

    def finer(self, ratio: float) -> DeadZone:
        """See `Rounding`."""
        return DeadZone(self.dead_zone * ratio, self.step * ratio)

    def learned(self, codes: Tensor) -> DeadZone:  # noqa: ARG002 - nothing to learn
        """See `Rounding`."""
        return self

    def quantize(self, coefficients: Tensor) -> tuple[Tensor, Moments]:
        """See `Rounding`."""
        peak = float(coefficients.abs().max()) if coefficients.numel() else 0.0
        codes = torch.empty(coefficients.shape, dtype=code_dtype((peak - self.dead_zone) / self.step))
        moments = Moments(0.0, 0.0, 0.0, 0.0, 0.0)
        for some, out in zip(coefficients.reshape(-1).split(_CACHED), codes.view(-1).split(_CACHED), strict=True):
            moments += self._quantize(some, out)
        return codes, moments

    def _quantize(self, coefficients: Tensor, out: Tensor) -> Moments:
        magnitude = coefficients.abs()
        level = magnitude - self.dead_zone
        level.mul_(1 / self.step).floor_().add_(1).clamp_(0, torch.iinfo(out.dtype).max)
        kept = (level > 0).to(torch.float32)
        out.copy_(torch.copysign(level, coefficients))
        return Moments(
            float(kept.sum()), float(level.sum()), dot(level, level), dot(level, magnitude), dot(kept, magnitude)
        )

    def feed(self, block: Tensor, square: Tensor, steps: Tensor, offset: float) -> tuple[Tensor, Tensor]:
        """See `Rounding`."""
        from spectral_surgery.kernels.feedback import feed_scalar

        codes, errors = torch.empty(block.shape, dtype=torch.int32), torch.empty(block.shape)
        ratio = self.dead_zone / self.step
        feed_scalar(block.numpy(), square.numpy(), steps.numpy(), ratio, offset, codes.numpy(), errors.numpy())
        return codes, errors

    def reconstruction(self, moments: Moments, largest: int) -> tuple[float, float]:
        """Step and offset of the least-squares line through the centroids of all levels; see `Rounding`.

        The offset is a multiple of ``1 / grid(largest, offset, most)``, with the levels that memory will hold.
        """
        if not moments.kept:
            return 1.0, 0.0
        spread = moments.level_square * moments.kept - moments.level**2
        slope = (moments.product * moments.kept - moments.magnitude * moments.level) / (spread or 1.0)
        offset = 0.0
        if spread > 1e-6 * moments.level**2 and slope > 0:  # less is the rounding of float32 sums
            offset = max((moments.magnitude - slope * moments.level) / moments.kept / slope, -0.5)
        offset = _snap(offset, largest)
        numerator = moments.product + offset * moments.magnitude
        denominator = moments.level_square + 2 * offset * moments.level + offset**2 * moments.kept
        return numerator / denominator, offset


def _snap(offset: float, largest: int) -> float:
    most = INT8_MAX if largest <= INT8_MAX else INT12_MAX
    if largest > most:
        return round(offset * _FEW_PARTS) / _FEW_PARTS
    offset = min(offset, float(most - largest))
    fine = min(grid(largest, offset, most), INT8_MAX)
    return round(offset * fine) / fine  # in the same unit interval, or at its end: on the grid of the result too


def dot(left: Tensor, right: Tensor) -> float:
    """A dot product of float32. torch.dot adds up in running sums, on ARM in one, which loses digits; sum in pairs."""
    parts = zip(torch.split(left, _SUMMED), torch.split(right, _SUMMED), strict=True)
    return sum(float((one * other).sum()) for one, other in parts)


def code_dtype(largest: float) -> torch.dtype:
    """Narrowest integer type for codes whose magnitudes are about ``largest`` at most."""
    for dtype in (torch.int8, torch.int16):
        if largest + 2 <= torch.iinfo(dtype).max:  # one more, and one spare for rounding
            return dtype
    return torch.int32


@dataclass(frozen=True)
class Scalar:
    """The row of the table."""

    name: str = "scalar"

    def for_bits(self, sample: Sample, bits: float) -> DeadZone:
        """See `Quantizer`."""
        return for_bits(sample.magnitudes, bits)

    def for_error(self, sample: Sample, relative_error: float) -> DeadZone:
        """See `Quantizer`."""
        return for_error(sample.magnitudes, relative_error)


def for_bits(magnitudes: Magnitudes, entropy: float) -> DeadZone:
    """Quantiser with the least error at a given entropy, in bits per coefficient."""
    ratios = _DEAD_ZONES
    steps = _steps(magnitudes, lambda s: ratios * s, _unfilled(entropy), len(ratios))
    _, distortion = magnitudes.estimates(ratios * steps, steps)
    return _quantizer(ratios, steps, int(distortion.argmin()))


def _unfilled(entropy: float) -> Callable[[Floats, Floats], npt.NDArray[np.bool_]]:
    return lambda found, distortion: (found <= entropy) & (distortion > EXACT**2)


def for_error(magnitudes: Magnitudes, relative_error: float) -> DeadZone:
    """Quantiser with the least entropy at a given relative error."""
    limit, ratios = relative_error**2, _DEAD_ZONES
    steps = _steps(magnitudes, lambda s: ratios * s, lambda _, distortion: distortion > limit, len(ratios))
    entropy, _ = magnitudes.estimates(ratios * steps, steps)
    return _quantizer(ratios, steps, int(entropy.argmin()))


def for_density(magnitudes: Magnitudes, threshold: float) -> DeadZone:
    """Widest step for coefficients at or above a threshold that adds at most 0.7 % to the error of the rest dropped."""
    limit = max(magnitudes.dropped(threshold) * _QUANTISATION_SHARE**2, _QUANTISATION_FLOOR**2)
    fixed = np.array([threshold])
    step = float(_steps(magnitudes, lambda _: fixed, lambda _, distortion: distortion > limit, 1)[0])
    return DeadZone(max(threshold, _ZERO * step), step)


def _quantizer(ratios: Floats, steps: Floats, which: int) -> DeadZone:
    step = float(steps[which])
    return DeadZone(float(ratios[which]) * step, step)


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
