"""Codes with error feedback at a rate: the step (or the threshold) is searched with the feedback in the loop."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.spectra.codec import Basis
from spectral_surgery.spectra.feedback import Codes, encode_codes, feedback_codes
from spectral_surgery.spectra.select import Magnitudes, Quantizer, Target, for_bits, for_density

_ATTEMPTS = 6
_TOLERANCE = 0.004  # of the asked rate
_DENSITY_TOLERANCE = 0.0005
_ROUND_UP = 0.45  # of a step is added before rounding down: larger codes cost more than they gain


def codes_at(coefficients: Tensor, factor: Tensor, target: Target, basis: Basis) -> Codes:
    """Codes at the asked bits or density.

    Args:
        coefficients: C, [O, I] float32.
        factor: from `feedback_factor`.
        target: bits or density.
        basis: of the coefficients.

    Returns:
        The codes; all zero for a zero matrix.
    """
    magnitudes = Magnitudes(coefficients.reshape(-1).numpy())
    if not magnitudes.rms > 0:
        return Codes(torch.zeros(coefficients.shape, dtype=torch.int32), 1.0)
    if target.kind == "density":
        return _at_density(coefficients, factor, target.value, magnitudes)
    step, best = for_bits(magnitudes, target.value).step, (math.inf, Codes(coefficients, 1.0))
    for _ in range(_ATTEMPTS):
        codes = feedback_codes(coefficients, factor, Quantizer((1 - _ROUND_UP) * step, step))
        bits = encode_codes(coefficients, codes, basis)[1].bits_per_weight
        best = min(best, (abs(bits / target.value - 1), codes), key=lambda own: own[0])
        if best[0] <= _TOLERANCE:
            break
        step *= 2.0 ** (bits - target.value)
    return best[1]


def _at_density(coefficients: Tensor, factor: Tensor, density: float, magnitudes: Magnitudes) -> Codes:
    low, high = 0.0, float(coefficients.abs().max())
    threshold = magnitudes.quantile(density)
    for _ in range(4 * _ATTEMPTS):
        quantizer = for_density(magnitudes, threshold)
        codes = feedback_codes(coefficients, factor, quantizer, _centred(magnitudes, quantizer))
        kept = torch.count_nonzero(codes.values).item() / codes.values.numel()
        if abs(kept - density) <= _DENSITY_TOLERANCE:
            break
        low, high = (threshold, high) if kept > density else (low, threshold)
        threshold = (low + high) / 2
    return codes


def _centred(magnitudes: Magnitudes, quantizer: Quantizer) -> float:
    """Offset at which reconstruction points are right on average, also where the first interval is a wide one."""
    kept = magnitudes.sorted[np.searchsorted(magnitudes.sorted, quantizer.dead_zone) :]
    if not kept.size:
        return 0.0
    levels = 1 + np.floor((kept - quantizer.dead_zone) / quantizer.step)
    return float(kept.mean() / quantizer.step - levels.mean())
