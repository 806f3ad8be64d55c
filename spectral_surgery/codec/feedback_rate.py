"""Codes with error feedback at a rate: the step is searched with the feedback in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import COLUMN_STEP_BITS, Basis
from spectral_surgery.codec.feedback import Codes, feedback_codes, step_shape, stored_codes
from spectral_surgery.codec.quantizers import DEFAULT, QUANTIZERS, Rounding
from spectral_surgery.codec.quantizers.scalar import DeadZone
from spectral_surgery.codec.sample import Sample

_ATTEMPTS = 12  # at low rates the slope is sometimes misjudged, as symbols are priced anew at each
_STEEPEST, _FLATTEST = 2.0, 0.05  # bits by log2 step
_LEAP = 2.0  # of log2 step, at most
_TOLERANCE = 0.004  # of the asked rate
_POWER = 0.6  # of the steps of columns: between what is best at 1.2 bits and at 4, measured on two models
_SAVED = 0.6  # of the bits that theory promises, one coder for all columns saves
_ROUND_UP = 0.45  # of a step is added before rounding down: larger codes cost more than they gain


def codes_at(
    coefficients: Tensor,
    factor: Tensor,
    bits: float,
    basis: Basis,
    *,
    quantizer: str | None = None,
    column_steps: bool = True,
    threads: int = 1,
) -> Codes:
    """Codes at the asked bits a weight. Returns the codes; all zero for a zero matrix.

    Args:
        coefficients: C, [O, I] float32.
        factor: from `feedback_factor`.
        bits: stored bits a weight.
        quantizer: name in QUANTIZERS; None for the usual one.
        column_steps: allow a step for every column, where that is worth its bytes.
        threads: groups of rows worked on at once; the result does not depend on it.
    """
    if not torch.count_nonzero(coefficients):
        return Codes(torch.zeros(coefficients.shape, dtype=torch.int32), 1.0)
    columns = worthwhile_steps(factor, len(coefficients)) if column_steps else None
    sample = Sample([coefficients])
    if (quantizer or DEFAULT["bits"]) == "scalar":
        step = QUANTIZERS["scalar"].for_bits(sample, bits).step
        rounding: Rounding = DeadZone((1 - _ROUND_UP) * step, step)
    else:
        rounding = QUANTIZERS[quantizer or DEFAULT["bits"]].for_bits(sample, bits)

    def trial(ratio: float, before: Codes | None) -> tuple[Codes, float]:
        learned = rounding if before is None else rounding.learned(before.values)
        codes = feedback_codes(coefficients, factor, learned.finer(ratio), 0.0, columns, threads=threads)
        return codes, 8 * stored_codes(codes, basis, threads=threads, verify=False).stored_bytes / codes.values.numel()

    return _at_bits(trial, bits)


def _at_bits(trial: Callable[[float, Codes | None], tuple[Codes, float]], bits: float) -> Codes:
    """The codes of the step that gives the nearest rate; the slope of the rate over log2 step is learned on the way.

    It is -1 where steps are fine, and next to nothing where almost all codes are zero.

    Args:
        trial: codes and rate for a multiple of the first step, with codes of another to learn from.
    """
    ratio = 1.0
    best, found = trial(ratio, None)
    rate, slope = found, -1.0
    for _ in range(_ATTEMPTS - 1):
        if abs(rate / bits - 1) <= _TOLERANCE:
            break
        leap = min(max((bits - found) / slope, -_LEAP), _LEAP)
        ratio, before = ratio * 2.0**leap, found
        codes, found = trial(ratio, best)
        slope = min(max((found - before) / leap, -_STEEPEST), -_FLATTEST)
        if abs(found - bits) < abs(rate - bits):
            best, rate = codes, found
        del codes  # one more would be in memory
    return best


def worthwhile_steps(factor: Tensor, rows: int) -> Tensor | None:
    """Relative steps of columns, [I], where they save more bits than they take.

    Args:
        factor: from `feedback_factor`.
        rows: O, that share the cost.
    """
    columns = step_shape(factor, _POWER)
    noise = factor.diagonal().double().pow(-2)
    saved = 0.5 * math.log2(float(noise.mean() / (noise * columns.double().square()).mean()))
    return columns if _SAVED * saved > COLUMN_STEP_BITS / rows else None
