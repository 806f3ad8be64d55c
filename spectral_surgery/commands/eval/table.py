"""A table of models: a plain one, compressed ones, and baselines made of the plain one on the fly."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spectral_surgery.baselines import BASELINES, Baseline, baseline
from spectral_surgery.commands.eval.baselines import Cost, calibrated_weights, matrices_of, plain_cost, write_baseline
from spectral_surgery.commands.eval.scores import Scores
from spectral_surgery.commands.eval.weights import Distance, distance
from spectral_surgery.commands.settings import Reference
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.files.index import read_index
from spectral_surgery.memory import peak_rss_growth
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.settings import EvalData

Measures = dict[str, float]
ALL = "all"  # of the baselines


@dataclass(frozen=True)
class ModelRow:
    """A row of the table of models.

    Attributes:
        measures: on the text: see `Scores`. The first model is compared with none.
        family: what it shares with the same method at other rates; empty for a plain checkpoint.
        seconds: that it took to make, where it was made for this table.
        peak_bytes: resident memory that it took to make at the peak, beyond what was there; where it was measured.
    """

    model: str
    cost: Cost
    measures: Measures
    family: str = ""
    short: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None

    def to_json(self) -> dict[str, object]:
        """Plain values; what was not measured is left out."""
        cost = self.cost
        making = {"seconds": self.seconds, "peak_bytes": self.peak_bytes}
        return {
            "model": self.model,
            "bits_per_weight": cost.bits_per_weight,
            "bytes": cost.nbytes,
            "relative_error": cost.relative_error,
            **self.measures,
            **{name: value for name, value in making.items() if value is not None},
        }


@dataclass(frozen=True)
class _Asked:
    """A baseline to make, at a rate where it needs one."""

    method: Baseline
    bits: float | None = None

    @property
    def label(self) -> str:
        return self.method.label if self.bits is None else f"{self.method.label}, {self.bits:.3g} bits"

    def make(self, a: Path, reference: Reference, compressed: CompressedCheckpoint | None, folder: Path) -> Cost:
        """Write what it leaves of A into an empty folder."""
        index = read_index(a)
        matrices, method, quantised = matrices_of(index, compressed), self.method, {}
        if method.calibrated and reference.calibration is not None:
            quantised = calibrated_weights(a, index, matrices.shapes, reference.calibration, method, bits=self.bits)
            method = baseline(method.without_inputs)  # for the rest, such as embeddings
        return write_baseline(index, matrices, method, self.bits, folder, quantised=quantised)


def model_table(
    a: Path, others: list[Path], data: EvalData, reference: Reference, *, device: str, progress: Progress
) -> tuple[tuple[ModelRow, ...], Distance, Measures]:
    """Judge A, others and baselines of A, each alone beside A.

    Returns:
        The rows, and of A and B, if there is one: their distance and their measures.

    Raises:
        ConfigError: when a baseline cannot be made.
    """
    compressed = [open_compressed(path) for path in others if is_compressed(path)]
    asked = list(_asked(reference, compressed))
    if asked and is_compressed(a):
        raise ConfigError(
            f"eval --baseline: expected a plain A to make them of, got {a.name}, which is compressed. Decompress it."
        )
    scores = Scores(a, data, device) if data.has_text else None
    total, done = len(asked) + len(others), 0
    baseline_rows, baseline_scores = [], []
    for one in asked:  # first: what they refuse is known before the long part
        with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as name:
            started = time.perf_counter()
            make = partial(one.make, a, reference, compressed[0] if compressed else None, Path(name))
            cost, peak = peak_rss_growth(make)
            seconds = time.perf_counter() - started
            baseline_scores.append(scores.measures(Path(name)) if scores else {})
        measures, method = _of_second(baseline_scores[-1]), one.method
        baseline_rows.append(ModelRow(one.label, cost, measures, method.family, method.name, seconds, peak))
        done += 1
        progress(done, total, one.label)
    rows, distances, pairs = [], [], []
    for path in others:
        distances.append(distance(a, path, silent))
        pairs.append(scores.measures(path) if scores else {})
        cost = _cost(path, compressed, distances[-1].relative_error)
        rows.append(ModelRow(path.name, cost, _of_second(pairs[-1]), _family(path), path.name))
        done += 1
        progress(done, total, path.name)
    either = (pairs + baseline_scores)[0]
    of_a = {name.removesuffix("_a"): value for name, value in either.items() if name.endswith("_a")}
    first = ModelRow(a.name, _cost(a, compressed, 0.0), of_a, short=a.name)
    measures = pairs[0] if pairs else {f"{name}_a": value for name, value in of_a.items()}
    return (first, *rows, *baseline_rows), distances[0] if distances else Distance(), measures


def _of_second(pair: Measures) -> Measures:
    """Of two models' measures, those of the second."""
    return {name.removesuffix("_b"): value for name, value in pair.items() if not name.endswith("_a")}


def _cost(path: Path, compressed: list[CompressedCheckpoint], relative_error: float) -> Cost:
    if is_compressed(path):
        checkpoint = open_compressed(path)
        return Cost(checkpoint.manifest.report.bits_per_weight, checkpoint.index.nbytes, relative_error)
    index = read_index(path)
    return plain_cost(index, matrices_of(index, compressed[0] if compressed else None), relative_error)


def _family(path: Path) -> str:
    """How a compressed checkpoint was made; empty for a plain one."""
    if not is_compressed(path):
        return ""
    options = open_compressed(path).manifest.options
    words = [word for name, word in (("calibration", "calibrated"), ("healing", "healed")) if options.get(name)]
    return " and ".join(words) or "data-free"


def _asked(reference: Reference, compressed: list[CompressedCheckpoint]) -> Iterator[_Asked]:
    """The baselines; one of each rate where a rate is needed, except of those that are too low for it."""
    rates = [checkpoint.manifest.report.bits_per_weight for checkpoint in compressed]
    if reference.bits:
        rates = [reference.bits]
    for name in reference.baselines:
        for method in BASELINES.values() if name == ALL else (baseline(name),):
            if method.calibrated and reference.calibration is None:
                raise ConfigError(
                    f"eval --baseline {method.name}: expected text to calibrate on, got none. Use --calibrate FILE."
                )
            if method.budgeted and not rates:
                raise ConfigError(
                    f"eval --baseline {method.name}: expected a compressed B or --bits to meet, got none."
                )
            possible = [bits for bits in rates if bits > method.above] or rates  # if none does, it says so itself
            yield from (_Asked(method, bits) for bits in possible) if method.budgeted else (_Asked(method),)
