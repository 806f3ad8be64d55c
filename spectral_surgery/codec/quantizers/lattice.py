"""Blocks of 32 rows of a column together, as points of a lattice: see `kernels.lattice`.

Which point is taken depends on its squared error and on the bits it costs, ``error + slope * bits``: the slope is that
of the bound at the same error, and the bits are those of the symbols m given c, as often as they occurred in a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.codec.parallel import parallel_map
from spectral_surgery.codec.quantized import Moments
from spectral_surgery.codec.quantizers.scalar import EXACT, code_dtype, dot
from spectral_surgery.codec.sample import Sample
from spectral_surgery.kernels import BLOCK

Array = npt.NDArray[Any]

SAVED = 0.155  # bits a coefficient, at the error that `scalar` has: of Gaussian numbers, from 1 to 5 bits

_SLOPE = 2 * math.log(2)  # of the bound: bits by the logarithm of the error, times the squared error
_NOISE = 0.22  # squared error in squared steps, to begin with
_PASSES = 2  # over the sample at each step, so that symbols and what they cost agree; one where both are near
_PRICED = 1 << 12  # magnitudes that have prices of their own
_UNSEEN = 0.05  # times that a code occurs that did not
_ATTEMPTS = 16
_NEAR = 0.02  # of a doubling of the step, from there on all of the sample is looked at
_CLOSE = 0.002  # of a doubling: close enough
_OCTAVES = 13.0  # around the root mean square, in which steps are looked for


@dataclass(frozen=True)
class LatticePoints:
    """The lattice at a step.

    Attributes:
        step: in units of the coefficients.
        slope: squared steps that a bit is worth.
        prices: [n] bits that a code of each magnitude takes; the last one for all larger ones.
        turned: whether blocks run along rows; for `levels` and `bits`.
    """

    step: float
    slope: float
    prices: Array
    turned: bool = False

    @property
    def costs(self) -> Array:
        """[n] float32, in squared steps."""
        return (self.slope * self.prices).astype(np.float32)

    def finer(self, ratio: float) -> LatticePoints:
        """See `Rounding`."""
        return replace(self, step=self.step * ratio)

    def learned(self, codes: Tensor) -> LatticePoints:
        """See `Rounding`."""
        return replace(self, prices=_prices(_counts(codes.numpy())))

    def levels(self, values: Tensor, *, threads: int = 1) -> Tensor:
        """[O, I] float32 to [O, I] int32 codes."""
        if self.turned:
            return replace(self, turned=False).levels(values.T.contiguous(), threads=threads).T.contiguous()
        parts = parallel_map(lambda part: _nearest(part.numpy(), self.step, self.costs), values.split(BLOCK), threads)
        return torch.from_numpy(np.concatenate(parts))

    def bits(self, codes: Tensor) -> float:
        """About what points of the lattice take, [O, I] integers, tables aside."""
        counts, height = _counts(codes.numpy()), codes.shape[1 if self.turned else 0]
        return _bits(counts, _prices(counts), min(height, BLOCK)) * codes.numel()

    def quantize(self, coefficients: Tensor) -> tuple[Tensor, Moments]:
        """See `Rounding`."""
        peak = float(coefficients.abs().max()) if coefficients.numel() else 0.0
        codes = torch.empty(coefficients.shape, dtype=code_dtype(peak / self.step + 3))
        moments = Moments(0.0, 0.0, 0.0, 0.0, 0.0)
        for some, out in zip(coefficients.split(BLOCK), codes.split(BLOCK), strict=True):
            levels = torch.from_numpy(_nearest(some.numpy(), self.step, self.costs))
            out.copy_(levels)
            flat, values = levels.reshape(-1).float(), some.reshape(-1)
            kept = float(torch.count_nonzero(levels))
            moments += Moments(kept, float(flat.abs().sum()), dot(flat, flat), dot(flat, values), 0.0)
        return codes, moments

    def feed(self, block: Tensor, square: Tensor, steps: Tensor, offset: float) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See `Rounding`; there is no offset."""
        from spectral_surgery.kernels.feedback import feed_lattice

        codes, errors = torch.empty(block.shape, dtype=torch.int32), torch.empty(block.shape)
        feed_lattice(block.numpy(), square.numpy(), steps.numpy(), self.costs, codes.numpy(), errors.numpy())
        return codes, errors

    def reconstruction(self, moments: Moments, largest: int) -> tuple[float, float]:  # noqa: ARG002 - no offset to fit
        """See `Rounding`: the step of the least squared error, and no offset."""
        return (moments.product / moments.level_square if moments.kept else 1.0), 0.0


def points_of(codes: Tensor, values: Tensor | None = None) -> LatticePoints | None:
    """The lattice in steps, with prices as codes have them; None where codes are no points of it.

    Args:
        codes: [O, I] integers.
        values: [O, I] float32 in steps, what was rounded to them, if it is known.
    """
    from spectral_surgery.kernels.lattice import words_of

    wide = codes.numpy().astype(np.int32)
    for turned in (False, True):
        seen = np.ascontiguousarray(wide.T if turned else wide)
        words = np.empty(-(-seen.shape[0] // BLOCK) * seen.shape[1], np.uint8)
        if seen.any() and words_of(seen, words):
            noise = _NOISE if values is None else float((values - codes).square().mean())
            return LatticePoints(1.0, _SLOPE * noise, _prices(_counts(wide)), turned)
    return None


@dataclass(frozen=True)
class Lattice:
    """The row of the table."""

    name: str = "lattice"

    def for_bits(self, sample: Sample, bits: float) -> LatticePoints:
        """See `Quantizer`."""
        return _search(sample, lambda trial: trial.bits - bits if trial.error > EXACT else 1.0)

    def for_error(self, sample: Sample, relative_error: float) -> LatticePoints:
        """See `Quantizer`."""
        return _search(sample, lambda trial: math.log2(relative_error / max(trial.error, 1e-9)))


class _Trial(NamedTuple):
    """What a step gives on a sample: bits a coefficient, and the relative error."""

    points: LatticePoints
    bits: float
    error: float


def _search(sample: Sample, above: Callable[[_Trial], float]) -> LatticePoints:
    """The step at which bits or accuracy are as asked; both fall by about one when it doubles.

    Args:
        above: of a trial, how many bits it is above what was asked.
    """
    rms, usual = sample.spread
    low, high = math.log2(rms) - _OCTAVES, math.log2(rms) + _OCTAVES
    place, all_of_it = float(min(max(math.log2(usual), low), high)), False
    trial, finer = _roughly(sample, place), None
    for _ in range(_ATTEMPTS):
        excess = above(trial)
        low, high = (max(low, place), high) if excess > 0 else (low, min(high, place))
        finer = trial if excess > 0 else finer
        if abs(excess) < _CLOSE and all_of_it:
            break
        if abs(excess) < _NEAR and not all_of_it:
            all_of_it = True
            low, high = place - 4 * _NEAR, place + 4 * _NEAR  # it was found on some of them
        place = float(place + excess if low < place + excess < high else (low + high) / 2)
        trial = _trial(sample.blocks, 2.0**place, trial.points) if all_of_it else _roughly(sample, place)
    nothing_left = trial.error == 1  # constants have no step between all of it and nothing
    return finer.points if finer is not None and nothing_left else trial.points


def _roughly(sample: Sample, place: float) -> _Trial:
    """What a step gives on some of a sample."""
    if place not in sample.found:
        sample.found[place] = _trial(sample.some, 2.0**place)
    found: _Trial = sample.found[place]
    return found


def _trial(blocks: Array, step: float, near: LatticePoints | None = None) -> _Trial:
    """What a step gives, with the prices and the slope of one that is near, or with its own."""
    scaled = blocks.astype(np.float64) / step
    prices, slope = (near.prices, near.slope) if near else (_prices(_counts(_rounded(scaled))), _SLOPE * _NOISE)
    for _ in range(1 if near else _PASSES):
        points = LatticePoints(step, slope, prices)
        levels = _nearest(blocks, step, points.costs)
        slope = _SLOPE * float(np.square(scaled - levels).mean())
        counts = _counts(levels)
        prices = _prices(counts)
    square = float(np.square(levels, dtype=np.float64).sum())
    shared = float((scaled * levels).sum()) ** 2 / square if square else 0.0
    error = math.sqrt(max(1 - shared / float(np.square(scaled).sum()), 0.0))
    return _Trial(points, _bits(counts, prices, len(blocks)), error)


def _rounded(scaled: Array) -> Array:
    limit = 1 << 30
    whole: Array = np.rint(np.clip(scaled, -limit, limit)).astype(np.int64)
    return whole


def _nearest(values: Array, step: float, costs: Array) -> Array:
    from spectral_surgery.kernels.nearest import nearest

    out = np.empty(values.shape, np.int32)
    nearest(np.ascontiguousarray(values), np.full(values.shape[1], 1 / step, np.float32), costs, out)
    return out


def _counts(levels: Array) -> Array:
    """How often each magnitude occurs, the last one with all larger ones: [n] int64."""
    return np.bincount(np.minimum(np.abs(levels), _PRICED - 1).reshape(-1))


def _prices(counts: Array) -> Array:
    """Bits of m given c for a code of each magnitude; two codes of opposite signs are equally frequent."""
    each = np.maximum(counts, _UNSEEN)
    each[1:] /= 2
    out: Array = -np.log2(each)
    for c in (0, 1):
        out[c::2] += math.log2(max(counts[c::2].sum(), 1))
    return out


def _bits(counts: Array, prices: Array, height: int) -> float:
    """Of a coefficient in blocks of ``height`` rows: its symbol, and its share of the word."""
    from spectral_surgery.kernels.lattice import word_bits

    total = float(counts.sum())
    block = float(word_bits(height))
    if height == BLOCK:  # the last m is known to be even or odd
        even = counts[0::4].sum() / max(counts[0::2].sum(), 1)
        block -= counts[1::2].sum() / total + counts[0::2].sum() / total * _entropy(even)
    return float((counts * prices).sum()) / total + block / height


def _entropy(p: float) -> float:
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)
