"""A table of models: a plain one, compressed ones, and baselines made of the plain one on the fly."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from spectral_surgery.baselines import BASELINES, Baseline, baseline
from spectral_surgery.commands.eval.baselines import Cost, calibrated_weights, matrices_of, plain_cost, write_baseline
from spectral_surgery.commands.eval.scores import Scores
from spectral_surgery.commands.eval.weights import Distance, distance
from spectral_surgery.commands.settings import Reference
from spectral_surgery.engines import ENGINES
from spectral_surgery.engines.cluster import PROCESS_BYTES
from spectral_surgery.errors import ConfigError, SpectralSurgeryError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.files.index import read_index
from spectral_surgery.memory import peak_rss_growth
from spectral_surgery.progress import silent
from spectral_surgery.run import Run
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


@dataclass(frozen=True)
class Judge:
    """Compares models with A. On another machine it loads A again."""

    a: Path
    data: EvalData
    device: str

    @cached_property
    def scores(self) -> Scores | None:
        """With A in memory; None without data."""
        return Scores(self.a, self.data, self.device) if self.data.has_text else None

    def __getstate__(self) -> dict[str, object]:
        """What other machines need."""
        return {"a": self.a, "data": self.data, "device": self.device}

    @property
    def memory(self) -> int:
        """Bytes that it takes: A and another model in float32, with data."""
        return PROCESS_BYTES + 8 * sum(info.numel for info in read_index(self.a).tensors.values()) * self.data.has_text

    def measures(self, other: Path) -> Measures:
        """Of both; none without data."""
        return self.scores.measures(other) if self.scores else {}

    def compare(self, other: Path) -> tuple[Distance, Measures]:
        """How far it is from A."""
        return distance(self.a, other, silent), self.measures(other)


@dataclass(frozen=True)
class ModelTable:
    """A, others and baselines of A.

    Attributes:
        rows: the models.
        apart: distance of A and B, if there is one.
        measures: of both, or of A alone.
        failed: what went wrong with others, by name.
    """

    rows: tuple[ModelRow, ...]
    apart: Distance
    measures: Measures
    failed: dict[str, str]


def model_table(
    judge: Judge,
    others: list[Path],
    reference: Reference,
    *,
    run: Run = Run(),  # noqa: B008 - frozen
) -> ModelTable:
    """Judge A, others and baselines of A, each alone beside A; others where the engine is.

    Raises:
        ConfigError: when a baseline cannot be made.
        SpectralSurgeryError: when nothing but others is asked for, and none can be judged.
    """
    a, compressed = judge.a, [open_compressed(path) for path in others if is_compressed(path)]
    asked = list(_asked(reference, compressed))
    if asked and is_compressed(a):
        raise ConfigError(
            f"eval --baseline: expected a plain A to make them of, got {a.name}, which is compressed. Decompress it."
        )
    total, done = len(asked) + len(others), 0
    baseline_rows, pairs = [], list[Measures]()
    for done, one in enumerate(asked, 1):  # first: what they refuse is known before the long part
        with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as name:
            started = time.perf_counter()
            make = partial(one.make, a, reference, compressed[0] if compressed else None, Path(name))
            cost, peak = peak_rss_growth(make)
            seconds = time.perf_counter() - started
            pairs.append(judge.measures(Path(name)))
        measures, method = _of_second(pairs[-1]), one.method
        baseline_rows.append(ModelRow(one.label, cost, measures, method.family, method.name, seconds, peak))
        run.progress(done, total, one.label)
    found: dict[int, Any] = {}
    calls = [partial(judge.compare, path) for path in others]
    with ENGINES[run.engine].reached(run):
        for number, result in ENGINES[run.engine].each(run, calls, judge.memory):
            found[number] = result
            run.progress(done + len(found), total, others[number].name)
    failed = {number: found.pop(number) for number in sorted(found) if isinstance(found[number], SpectralSurgeryError)}
    if failed and not (found or asked):
        raise next(iter(failed.values()))
    rows = [_row(others[number], compressed, *found[number]) for number in sorted(found)]
    either = [*(measures for _, measures in found.values()), *pairs][0]
    of_a = {name.removesuffix("_a"): value for name, value in either.items() if name.endswith("_a")}
    first = ModelRow(a.name, _cost(a, compressed, 0.0), of_a, short=a.name)
    apart, measures = found.get(0, (Distance(), {f"{name}_a": value for name, value in of_a.items()}))
    reasons = {str(others[number]): str(error) for number, error in failed.items()}
    return ModelTable((first, *rows, *baseline_rows), apart, measures, reasons)


def _row(path: Path, compressed: list[CompressedCheckpoint], apart: Distance, pair: Measures) -> ModelRow:
    cost = _cost(path, compressed, apart.relative_error)
    return ModelRow(path.name, cost, _of_second(pair), _family(path), path.name)


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
