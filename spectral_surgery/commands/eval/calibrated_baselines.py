"""A checkpoint as a calibrated baseline would leave it, block by block on the same text as ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spectral_surgery.baselines import Baseline, BaselineResult
from spectral_surgery.calibration.layer_moments import layer_moments, model_and_text
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.text.data import TextData


def calibrated_weights(
    source: Path,
    index: CheckpointIndex,
    names: Mapping[str, object],
    data: TextData,
    baseline: Baseline,
    *,
    bits: float | None = None,
) -> dict[str, BaselineResult]:
    """Compress the linear layers in a model's blocks; what is not in a block has no inputs to go by.

    Raises:
        ConfigError: when the baseline cannot have the rate; the tensor is named.
    """
    results = {}
    matrices = [name for name in names if len(index.tensors[name].shape) == 2]
    for turn in layer_moments(*model_and_text(source, index, data), matrices):
        weight = turn.matrix.weight.float()
        try:
            result = baseline.apply(weight.T if turn.transposed else weight, bits, turn.moment)
        except ConfigError as error:
            raise ConfigError(f"{turn.tensor}: {error}") from None
        dense = result.weight.T.contiguous() if turn.transposed else result.weight
        turn.matrix.put(dense)
        results[turn.tensor] = BaselineResult(dense, result.stored_bytes)
    return results
