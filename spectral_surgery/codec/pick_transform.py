"""Which transform suits a matrix: measured rate and distortion of a sample of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, frame_spans
from spectral_surgery.codec.quantizers.scalar import EXACT, for_bits, for_density, for_error
from spectral_surgery.codec.rate import Magnitudes, Target

_MARGIN = 0.99  # another transform must leave 1 % less error (or bits) than the default


def choose_basis(weight: Tensor, target: Target, candidates: Sequence[Basis]) -> Basis:
    """The candidate that leaves the least error at the asked rate (or costs the fewest bits at the asked error).

    Args:
        weight: [O, I]; rows of tiles are sampled evenly, about 2^20 weights.
        target: as for `encode`.
        candidates: the first one is kept unless another is better by more than 1 %.
    """
    if len(candidates) == 1:
        return candidates[0]
    weight = weight.detach()
    spans = frame_spans(weight.shape[0], candidates[0].tile)
    some = spans[:: max(1, weight.numel() // (1 << 20))]
    best, best_cost = candidates[0], float("inf")
    for basis in candidates:
        sample = torch.cat([basis.forward(weight[slice(*span)]).reshape(-1) for span in some])
        cost = _cost(Magnitudes(sample.numpy()), target)
        if cost < best_cost * (_MARGIN if basis is not candidates[0] else 1):
            best, best_cost = basis, cost
    return best


def _cost(magnitudes: Magnitudes, target: Target) -> float:
    if not 0 < magnitudes.rms < math.inf:  # nothing to compare; `encode` says what is wrong
        return 0.0
    if target.kind == "max_error":
        return for_error(magnitudes, target.value).estimate(magnitudes).entropy
    if target.kind == "bits":
        found = for_bits(magnitudes, target.value).estimate(magnitudes)
        return max(math.sqrt(found.distortion), EXACT * found.entropy / target.value)  # both exact: the smaller one
    return math.sqrt(for_density(magnitudes, magnitudes.quantile(target.value)).estimate(magnitudes).distortion)
