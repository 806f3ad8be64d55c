"""A table of models: a plain one, compressed ones, and baselines made of the plain one on the fly."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spectral_surgery.baselines import BASELINES, Baseline, baseline
from spectral_surgery.commands.eval.baselines import Cost, matrices_of, plain_cost, write_baseline
from spectral_surgery.commands.eval.calibrated_baselines import calibrated_weights
from spectral_surgery.commands.eval.weights import Distance, distance
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.files.index import read_index
from spectral_surgery.memory import peak_rss_growth
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.data import TextData
from spectral_surgery.text.scores import EvalData, Judge

Measures = dict[str, float]
ALL = "all"  # of the baselines


@dataclass(frozen=True)
class Beside:
    """What else is put into the table of models.

    Attributes:
        others: more checkpoints like B.
        baselines: names in BASELINES, or short ones, or `all`; made of A, of the matrices that the compressed ones
            compress.
        bits: per weight, of baselines that need a rate; None for the rate of each compressed checkpoint.
        calibration: text for baselines that need some, such as gptq4.
    """

    others: tuple[Path, ...] = ()
    baselines: tuple[str, ...] = ()
    bits: float | None = None
    calibration: TextData | None = None

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
        family: what it shares with the same method at other rates; empty for a plain checkpoint.
        short: name of the folder, or short name of the baseline.
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
        made = {"seconds": self.seconds, "peak_bytes": self.peak_bytes}
        return {
            "model": self.model,
            "bits_per_weight": cost.bits_per_weight,
            "bytes": cost.nbytes,
            "relative_error": cost.relative_error,
            **self.measures,
            **{name: value for name, value in made.items() if value is not None},
        }


@dataclass(frozen=True)
class _Asked:
    """A baseline to make, at a rate where it needs one."""

    own: Baseline
    bits: float | None = None

    @property
    def label(self) -> str:
        return self.own.label if self.bits is None else f"{self.own.label}, {self.bits:.3g} bits"

    def make(self, a: Path, beside: Beside, compressed: CompressedCheckpoint | None, folder: Path) -> Cost:
        """Write what it leaves of A into an empty folder."""
        index = read_index(a)
        matrices, own, made = matrices_of(index, compressed), self.own, {}
        if own.calibrated and beside.calibration is not None:
            made = calibrated_weights(a, index, matrices.shapes, beside.calibration, own, bits=self.bits)
            own = baseline(own.without_inputs)  # for the rest, such as embeddings
        return write_baseline(index, matrices, own, self.bits, folder, made=made)


def model_table(
    a: Path, others: list[Path], data: EvalData, beside: Beside, *, device: str, progress: Progress
) -> tuple[tuple[ModelRow, ...], Distance, Measures]:
    """Judge A, others and baselines of A, each on its own beside A.

    Returns:
        The rows, and of A and B, if there is one: their distance and their measures.

    Raises:
        ConfigError: when a baseline cannot be made.
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
    for one in asked:  # first: what they refuse is known before the long part
        with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as name:
            started = time.perf_counter()
            make = partial(one.make, a, beside, compressed[0] if compressed else None, Path(name))
            cost, peak = peak_rss_growth(make)
            seconds = time.perf_counter() - started
            found.append(judge.measures(Path(name)) if judge else {})
        row = ModelRow(one.label, cost, _own(found[-1]), one.own.family, one.own.name, seconds, peak)
        beside_rows.append(row)
        done += 1
        progress(done, total, one.label)
    rows, distances, pairs = [], [], []
    for path in others:
        distances.append(distance(a, path, silent))
        pairs.append(judge.measures(path) if judge else {})
        cost = _cost(path, compressed, distances[-1].relative_error)
        rows.append(ModelRow(path.name, cost, _own(pairs[-1]), _family(path), path.name))
        done += 1
        progress(done, total, path.name)
    either = (pairs + found)[0]
    of_a = {name.removesuffix("_a"): value for name, value in either.items() if name.endswith("_a")}
    first = ModelRow(a.name, _cost(a, compressed, 0.0), of_a, short=a.name)
    measures = pairs[0] if pairs else {f"{name}_a": value for name, value in of_a.items()}
    return (first, *rows, *beside_rows), distances[0] if distances else Distance(), measures


def _own(pair: Measures) -> Measures:
    """Of two models' measures, those of the second."""
    return {name.removesuffix("_b"): value for name, value in pair.items() if not name.endswith("_a")}


def _cost(path: Path, compressed: list[CompressedCheckpoint], relative_error: float) -> Cost:
    if is_compressed(path):
        own = open_compressed(path)
        return Cost(own.manifest.report.bits_per_weight, own.index.nbytes, relative_error)
    index = read_index(path)
    return plain_cost(index, matrices_of(index, compressed[0] if compressed else None), relative_error)


def _family(path: Path) -> str:
    """How a compressed checkpoint was made; empty for a plain one."""
    if not is_compressed(path):
        return ""
    options = open_compressed(path).manifest.options
    words = [word for name, word in (("calibration", "calibrated"), ("healing", "healed")) if options.get(name)]
    return " and ".join(words) or "data-free"


def _asked(beside: Beside, compressed: list[CompressedCheckpoint]) -> Iterator[_Asked]:
    """The baselines; one of each rate where a rate is needed, except of those that are too low for it."""
    rates = [beside.bits] if beside.bits else [own.manifest.report.bits_per_weight for own in compressed]
    for name in beside.baselines:
        for own in BASELINES.values() if name == ALL else (baseline(name),):
            if own.calibrated and beside.calibration is None:
                raise ConfigError(
                    f"eval --baseline {own.name}: needs text to calibrate on. Give some with --calibrate."
                )
            if own.budgeted and not rates:
                raise ConfigError(f"eval --baseline {own.name}: no rate to meet; a compressed B or --bits is accepted.")
            held = [bits for bits in rates if bits > own.above] or rates  # if none does, it says so itself
            yield from (_Asked(own, bits) for bits in held) if own.budgeted else (_Asked(own),)
