"""A real language model: size, perplexity and KL of SmolLM2-135M-Instruct compressed, beside other formats."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from benchmarks.case import Inputs, Row, chosen, require
from benchmarks.judged import Setting, require_same_errors, scratch_folder, settings, verified
from benchmarks.llama_files import llama_rows
from benchmarks.packaged import smollm2_file, smollm2_folder
from benchmarks.plot import plot_rates
from benchmarks.reference_text import write_split
from spectral_surgery import (
    DistillSettings,
    EvalData,
    EvalReport,
    Healing,
    Reference,
    Target,
    TextData,
    evaluate,
    read_index,
)
from spectral_surgery.baselines import baseline
from spectral_surgery.registry import Table
from spectral_surgery.text.examples import read_examples
from spectral_surgery.text.settings import Keep

SEQUENCES, LENGTH = 24, 256  # of the text to judge on
SAMPLES = 128  # sequences of that length to calibrate on
SETTINGS = Table(
    "row",
    [
        *settings((5.4, 4.0, 3.0, 2.5, 2.0), calibrated=False),
        Setting("sparsity-0.2", Target("density", 0.2)),
        *settings((4.0, 3.0, 2.5), calibrated=True),
    ],
)
OTHERS = ("nf4", "int4", "int3", "gptq4", "gptq3", "hqq4", "hqq3")
LLAMA = "llama.cpp"
_DENSE = "dense"
ROADS: dict[str, Keep] = {f"heal-{keep}": keep for keep in get_args(Keep)}
NAMES = (
    _DENSE,
    *SETTINGS,
    *ROADS,
    *OTHERS,
    LLAMA,
)  # the dense model is always measured: the others are compared with it
QUICK = ("4", "3")
HEALED, FIFTH = Target("bits", 2.0), Target("density", 0.2)
TAKES = ("only", "text", "train_text", "heal_minutes", "scratch")
NOTES = (
    "bits per weight: every byte over every weight; of nf4, int, GPTQ and HQQ the bytes that a file would have.",
    "The weights come from a Q4_1 file: matrices lie on a grid of 16 levels in blocks of 32 weights, so 4-bit formats"
    " with such blocks are flattered at 4 bits; the embeddings lie on one of 8 bits.",
    "Minutes of rows that are healed: time of the processor's cores over their number, verification included.",
)


@dataclass(frozen=True)
class _Bench:
    """What every row is measured with."""

    dense: Path
    scratch: Path
    text: EvalData
    train: TextData
    weights: int
    perplexity: float  # of the dense model

    def ours(self, setting: Setting) -> Row:
        """A compression at a setting."""
        calibrate = self.train if setting.calibrated else None
        return self._compressed(setting.name, setting.method, setting.label, setting.target, calibrate=calibrate)

    def healed(self, minutes: float) -> Row:
        """A calibrated compression, healed for some minutes."""
        healing = Healing(TextData(self.train.file), DistillSettings(minutes=minutes))
        label = f"--bits {HEALED.value:g} --heal --minutes {minutes:g}"
        return self._compressed(
            "healed", "spectral, calibrated and healed", label, HEALED, calibrate=self.train, heal=healing
        )

    def road(self, keep: Keep, minutes: float) -> Row:
        """A fifth of the coefficients, chosen in one of the ways, and healed."""
        settings = DistillSettings(minutes=minutes) if minutes else DistillSettings(steps=1)
        healing = Healing(TextData(self.train.file), settings, keep)
        label = f"--sparsity 0.2 --heal --keep {keep} --minutes {minutes:g}"
        return self._compressed(f"heal-{keep}", "spectral, healed", label, FIFTH, calibrate=None, heal=healing)

    def _compressed(
        self,
        name: str,
        method: str,
        label: str,
        target: Target,
        *,
        calibrate: TextData | None,
        heal: Healing | None = None,
    ) -> Row:
        folder = self.scratch / name
        began = cpu_time()
        report = verified(self.dense, folder, target, calibrate=calibrate, heal=heal, clock=cpu_time)
        seconds = cpu_time() - began if heal else report.seconds
        judged = evaluate(self.dense, folder, self.text)
        require_same_errors(report, judged)
        self._require_same_text(judged)
        measures = judged.measures
        return self.row(
            method,
            label,
            report.output_bytes,
            perplexity=measures["perplexity_b"],
            kl=measures["kl"],
            seconds=seconds,
        )

    def other(self, name: str) -> Row:
        """What a baseline leaves."""
        judged = evaluate(self.dense, None, self.text, reference=Reference(baselines=(name,), calibration=self.train))
        self._require_same_text(judged)
        found, method = judged.models[1], baseline(name)
        return self.row(
            _FAMILIES.get(method.family, method.family),
            method.label,
            found.cost.nbytes,
            perplexity=found.measures["perplexity"],
            kl=found.measures["kl"],
            seconds=found.seconds or 0.0,
        )

    def row(self, method: str, label: str, nbytes: int, *, perplexity: float, kl: float, seconds: float) -> Row:
        """A row of the table."""
        require(math.isfinite(perplexity) and kl >= -1e-6, f"{method} {label}: perplexity {perplexity}, KL {kl}")
        return {
            "method": method,
            "setting": label,
            "bytes": nbytes,
            "bits per weight": 8 * nbytes / self.weights,
            "perplexity": perplexity,
            "kl": kl,
            "minutes": seconds / 60,
        }

    def _require_same_text(self, judged: EvalReport) -> None:
        found = judged.measures["perplexity_a"]
        require(
            math.isclose(found, self.perplexity, rel_tol=1e-4),
            f"the dense model has a perplexity of {found:g}, and {self.perplexity:g} before",
        )


_FAMILIES = {"int": "round to nearest", "gptq": "GPTQ", "hqq": "HQQ"}


def cpu_time() -> float:
    """Seconds that all cores of this process together had, over their number: other work on the machine counts not."""
    return time.process_time() / torch.get_num_threads()


def run(inputs: Inputs) -> list[Row]:
    """The dense model and every row that is asked for.

    Raises:
        ConfigError: when a row is unknown, or the package that carries the weights is not installed.
    """
    names = chosen(inputs.only, NAMES, QUICK, inputs)
    with scratch_folder(inputs) as scratch:
        bench = _bench(smollm2_folder(scratch), scratch, inputs)
        nbytes = read_index(bench.dense).nbytes
        rows = [
            bench.row(_DENSE, "bfloat16", nbytes, perplexity=bench.perplexity, kl=0.0, seconds=0.0) | {"minutes": ""}
        ]
        rows += [bench.ours(SETTINGS[name]) for name in names if name in SETTINGS]
        roads = [name for name in names if name in ROADS and name in inputs.only]  # they take long
        rows += [bench.road(ROADS[name], inputs.heal_minutes or 0.0) for name in roads]
        if inputs.heal_minutes is not None and not roads:
            rows.append(bench.healed(inputs.heal_minutes))
        rows += [bench.other(name) for name in names if name in OTHERS]
        if LLAMA in names and bench.text.text is not None:
            text = " ".join(example.texts[0] for example in read_examples(bench.text.text))
            rows += llama_rows(smollm2_file(), bench.dense, scratch, text, sequences=SEQUENCES, length=LENGTH)
    return rows


def _bench(dense: Path, scratch: Path, inputs: Inputs) -> _Bench:
    train, held_out = write_split(scratch)
    text = EvalData(inputs.text or held_out, samples=SEQUENCES, seq_length=LENGTH)
    data = TextData(inputs.train_text or train, samples=SAMPLES, seq_length=LENGTH)
    perplexity = evaluate(dense, None, text).measures["perplexity_a"]
    weights = sum(math.prod(info.shape) for info in read_index(dense).tensors.values())
    return _Bench(dense, scratch, text, data, weights, perplexity)


def plot(rows: list[Row], file: Path) -> None:
    """Draw perplexity over bits per weight."""
    curves: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    level = 0.0
    for row in rows:
        if row.get("method") == _DENSE:
            level = float(str(row["perplexity"]))
        elif "method" in row:
            point = (float(str(row["bits per weight"])), float(str(row["perplexity"])), str(row["setting"]))
            curves[str(row["method"])].append(point)
    plot_rates(curves, level, file)
