"""A table of models: a plain one, compressed ones, and baselines made of the plain one on the fly."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spectral_surgery.checkpoint.compressed import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.checkpoint.index import CheckpointIndex, read_index
from spectral_surgery.errors import ConfigError
from spectral_surgery.spectra.baselines import Baseline, BaselineResult, baseline
from spectral_surgery.workflows.baseline_checkpoint import Cost, Matrices, matrices_of, plain_cost, write_baseline
from spectral_surgery.workflows.distance import Distance, distance
from spectral_surgery.workflows.gptq_baseline import BITS, gptq_weights
from spectral_surgery.workflows.judge import EvalData, Judge
from spectral_surgery.workflows.layer_moments import CalibrationData
from spectral_surgery.workflows.progress import Progress, silent

Measures = dict[str, float]
_NEAREST = {"gptq4": "int4", "gptq3": "int3", "gptq2": "int2"}  # for what is in no block, such as embeddings


@dataclass(frozen=True)
class Beside:
    """What else is put into the table of models.

    Attributes:
        others: more checkpoints like B.
        baselines: names in BASELINES, or short ones; made of A, of the matrices that the compressed ones compress.
        bits: per weight, of baselines that need a rate; None for the rate of each compressed checkpoint.
        calibration: text for baselines that need some: gptq4, gptq3, gptq2.
    """

    others: tuple[Path, ...] = ()
    baselines: tuple[str, ...] = ()
    bits: float | None = None
    calibration: CalibrationData | None = None

    @property
    def given(self) -> bool:
        """Whether there is anything."""
        return bool(self.others or self.baselines)


@dataclass(frozen=True)
class ModelRow:
    """A row of the table of models.

    Attributes:
        model: name of the folder, or the baseline.
        cost: what it takes and what it lost.
        measures: on the text: perplexity, kl, same_top; cosine; spearman. The first model is compared with none.
    """

    model: str
    cost: Cost
    measures: Measures

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        cost = self.cost
        return {
            "model": self.model,
            "bits_per_weight": cost.bits_per_weight,
            "bytes": cost.nbytes,
            "relative_error": cost.relative_error,
            **self.measures,
        }


def model_table(
    a: Path, others: list[Path], data: EvalData, beside: Beside, *, device: str, progress: Progress
) -> tuple[tuple[ModelRow, ...], Distance, Measures]:
    """Judge A, others and baselines of A, each on its own beside A.

    Args:
        a: a checkpoint; a plain one where there are baselines.
        others: B and what comes after it.
        data: text to judge on; without any, the table tells sizes and errors.
        beside: the baselines.
        device: models run on it.
        progress: called after each model.

    Returns:
        The rows, and of A and B, if there is one: their distance and their measures.

    Raises:
        ConfigError: when a baseline cannot be made.
        CheckpointError: when something cannot be read or loaded.
    """
    compressed = [open_compressed(path) for path in others if is_compressed(path)]
    asked = list(_asked(beside, compressed))
    if asked and is_compressed(a):
        raise ConfigError(
            f"eval --baseline: {a.name} is compressed; a plain A is accepted, of which they are made. Decompress it."
        )
    judge = Judge(a, data, device) if data.given else None
    total, done = len(asked) + len(others), 0
    beside_rows, found = [], []
    for label, own, bits in asked:  # first: what they refuse is known before the long part
        with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as name:
            folder, index = Path(name), read_index(a)
            matrices = matrices_of(index, compressed[0] if compressed else None)
            made = _calibrated(a, index, matrices, label, beside)
            cost = write_baseline(index, matrices, own, bits, folder, made=made)
            found.append(judge.measures(folder) if judge else {})
        beside_rows.append(ModelRow(label, cost, _own(found[-1])))
        done += 1
        progress(done, total, label)
    rows, distances, pairs = [], [], []
    for path in others:
        distances.append(distance(a, path, silent))
        pairs.append(judge.measures(path) if judge else {})
        rows.append(ModelRow(path.name, _cost(path, compressed, distances[-1].relative_error), _own(pairs[-1])))
        done += 1
        progress(done, total, path.name)
    either = (pairs + found)[0]
    of_a = {name.removesuffix("_a"): value for name, value in either.items() if name.endswith("_a")}
    first = ModelRow(a.name, _cost(a, compressed, 0.0), of_a)
    measures = pairs[0] if pairs else {f"{name}_a": value for name, value in of_a.items()}
    return (first, *rows, *beside_rows), distances[0] if distances else Distance(), measures


def _calibrated(
    a: Path, index: CheckpointIndex, matrices: Matrices, label: str, beside: Beside
) -> dict[str, BaselineResult]:
    """What a calibrated baseline makes of the layers in blocks; nothing for other baselines."""
    if label not in BITS or beside.calibration is None:
        return {}
    return gptq_weights(a, index, matrices.shapes, beside.calibration, BITS[label])


def _own(pair: Measures) -> Measures:
    """Of two models' measures, those of the second."""
    return {name.removesuffix("_b"): value for name, value in pair.items() if not name.endswith("_a")}


def _cost(path: Path, compressed: list[CompressedCheckpoint], relative_error: float) -> Cost:
    if is_compressed(path):
        own = open_compressed(path)
        return Cost(own.manifest.report.bits_per_weight, own.index.nbytes, relative_error)
    index = read_index(path)
    return plain_cost(index, matrices_of(index, compressed[0] if compressed else None), relative_error)


def _asked(beside: Beside, compressed: list[CompressedCheckpoint]) -> Iterator[tuple[str, Baseline, float | None]]:
    """Label, baseline and rate of each row; one of each rate where a rate is needed."""
    rates = [beside.bits] if beside.bits else [own.manifest.report.bits_per_weight for own in compressed]
    for name in beside.baselines:
        if name in BITS:
            if beside.calibration is None:
                raise ConfigError(f"eval --baseline {name}: needs text to calibrate on. Give some with --calibrate.")
            yield name, baseline(_NEAREST[name]), None
            continue
        own = baseline(name)
        if not own.budgeted:
            yield own.label, own, None
            continue
        if not rates:
            raise ConfigError(f"eval --baseline {name}: no rate to meet; a compressed B or --bits is accepted.")
        yield from ((f"{own.label}, {bits:.3g} bits", own, bits) for bits in rates)
