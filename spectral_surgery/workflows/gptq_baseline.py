"""A checkpoint as GPTQ would leave it, calibrated block by block on the same text as ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spectral_surgery.checkpoint.index import CheckpointIndex
from spectral_surgery.spectra.baselines import BaselineResult
from spectral_surgery.spectra.gptq import gptq
from spectral_surgery.workflows.layer_moments import CalibrationData, layer_moments

BITS = {"gptq4": 4, "gptq3": 3, "gptq2": 2}
GROUP = 128


def gptq_weights(
    source: Path, index: CheckpointIndex, names: Mapping[str, object], data: CalibrationData, bits: int
) -> dict[str, BaselineResult]:
    """Quantise the linear layers in a model's blocks; what is not in a block has no inputs to go by.

    Args:
        source: a plain checkpoint with a tokenizer.
        index: of it.
        names: tensors wanted.
        data: text.
        bits: of a code.

    Returns:
        By tensor name, in the shape it is stored in.
    """
    found = {}
    for turn in layer_moments(source, index, data, names):
        weight = turn.layer.weight.detach().float()
        made = gptq(weight.T if turn.transposed else weight, turn.moment, bits=bits, group=GROUP)
        dense = made.weight.T.contiguous() if turn.transposed else made.weight
        turn.put(dense)
        found[turn.tensor] = BaselineResult(dense, made.stored_bytes)
    return found
