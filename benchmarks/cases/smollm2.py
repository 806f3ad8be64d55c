"""A real language model: size, perplexity and KL of SmolLM2-135M-Instruct compressed, beside other formats."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from benchmarks.case import Inputs, Row, chosen
from benchmarks.judged import Setting, cpu_time, require_same_errors, scratch_folder, settings, verified
from benchmarks.llama_files import llama_rows
from benchmarks.packaged import smollm2_file, smollm2_folder
from benchmarks.plot import plot_rates
from benchmarks.reference_text import write_split
from benchmarks.token_judge import CLASS, Judged, TokenJudge, causal_logits, judged_columns
from spectral_surgery import DistillSettings, EvalData, Healing, Target, TextData, evaluate, read_index
from spectral_surgery.baselines import baseline
from spectral_surgery.commands.eval.baselines import calibrated_weights, matrices_of, write_baseline
from spectral_surgery.hf.models import load_model
from spectral_surgery.registry import Table
from spectral_surgery.text.settings import Keep

SEQUENCES, LENGTH = 48, 256  # of the text to judge on, at most
SAMPLES = 128  # sequences of that length to calibrate on
SETTINGS = Table(
    "row",
    [
        *settings((5.4, 4.0, 3.0, 2.5, 2.0), calibrated=False),
        *settings((4.0, 3.0, 2.5), calibrated=False, quantizer="scalar"),
        Setting("sparsity-0.2", Target("density", 0.2)),
        Setting("calibrated-sparsity-0.2", Target("density", 0.2), calibrated=True),
        *settings((4.0, 3.0, 2.5), calibrated=True),
        *settings((4.0, 3.0, 2.5), calibrated=True, quantizer="scalar"),
    ],
)
OTHERS = ("nf4", "int4", "int3", "gptq4", "gptq3", "hqq4", "hqq3")
LLAMA = "llama.cpp"
_DENSE = "dense"
ROADS: dict[str, Keep] = {f"heal-{keep}": keep for keep in get_args(Keep)}
HEALED = {f"healed-{bits:g}": Setting(f"healed-{bits:g}", Target("bits", bits), calibrated=True) for bits in (2.0, 1.0)}
NAMES = (_DENSE, *SETTINGS, *HEALED, *ROADS, *OTHERS, LLAMA)  # dense is always measured: others are compared with it
QUICK, FIFTH = ("4", "3"), Target("density", 0.2)
TAKES = ("model", "only", "text", "train_text", "heal_minutes", "scratch")
NOTES = (
    "bits per weight: every byte over every weight; of nf4, int, GPTQ and HQQ the bytes that a file would have.",
    "+-: standard errors over sequences; that of a perplexity is of its distance to the dense model's.",
    "The weights come from a Q4_1 file: matrices lie on a grid of 16 levels in blocks of 32 weights, so 4-bit formats"
    " with such blocks are flattered at 4 bits; the embeddings lie on one of 8 bits. (Not of another --model.)",
    "Minutes of rows that are healed: time of the processor's cores over their number, verification included.",
)


@dataclass(frozen=True)
class _Bench:
    """What every row is measured with."""

    dense: Path
    scratch: Path
    judge: TokenJudge
    train: TextData

    def ours(self, setting: Setting, heal: Healing | None = None) -> Row:
        """A compression at a setting, calibrated if it says so, and healed on a clock of processor time."""
        folder, calibrate = self.scratch / setting.name, self.train if setting.calibrated else None
        clock, began = cpu_time if heal else time.perf_counter, cpu_time()
        report = verified(self.dense, folder, setting.options, calibrate=calibrate, heal=heal, clock=clock)
        seconds = cpu_time() - began if heal else report.seconds
        require_same_errors(report, evaluate(self.dense, folder, EvalData()))
        method, label = setting.method, setting.label
        if heal is not None:
            keep = "" if setting.calibrated else f" --keep {heal.keep}"
            method, label = f"{method} and healed", f"{label} --heal{keep} --minutes {heal.settings.minutes or 0:g}"
        return self._row(method, label, report.output_bytes, self._judged(folder), seconds)

    def healed(self, name: str, minutes: float) -> Row:
        """A compression that is healed for some minutes; without, for one step."""
        settings = DistillSettings(minutes=minutes) if minutes else DistillSettings(steps=1)
        keep, text = ROADS.get(name), TextData(self.train.file)
        return self.ours(HEALED.get(name) or Setting(name, FIFTH), Healing(text, settings, keep))

    def other(self, name: str) -> Row:
        """What a baseline leaves."""
        method, index = baseline(name), read_index(self.dense)
        matrices, folder, started = matrices_of(index, None), self.scratch / name, time.perf_counter()
        quantised, rest = {}, method
        if method.calibrated:  # the linear layers; of embeddings there are no inputs
            quantised = calibrated_weights(self.dense, index, matrices.shapes, self.train, method)
            rest = baseline(method.without_inputs)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        cost = write_baseline(index, matrices, rest, None, folder, quantised=quantised)
        seconds = time.perf_counter() - started
        family = _FAMILIES.get(method.family, method.family)
        row = self._row(family, method.label, cost.nbytes, self._judged(folder), seconds)
        shutil.rmtree(folder)
        return row

    def plain(self) -> Row:
        """The dense model."""
        row = self._row(_DENSE, "bfloat16", read_index(self.dense).nbytes, None, 0.0)
        return row | {"perplexity": self.judge.perplexity}

    def _judged(self, folder: Path) -> Judged:
        return self.judge.judge(causal_logits(load_model(folder, CLASS, dtype=torch.float32)[0]))

    def _row(self, method: str, label: str, nbytes: int, judged: Judged | None, seconds: float) -> Row:
        return {
            "method": method,
            "setting": label,
            "bytes": nbytes,
            "bits per weight": 8 * nbytes / self.judge.weights,
            **judged_columns(judged),
            "minutes": seconds / 60 if judged else "",
        }


_FAMILIES = {"int": "round to nearest", "gptq": "GPTQ", "hqq": "HQQ"}


def run(inputs: Inputs) -> list[Row]:
    """The dense model and every row that is asked for; llama.cpp's files are those of SmolLM2 alone.

    Raises:
        ConfigError: when a row is unknown, or the package that carries the weights is not installed.
    """
    names = chosen(inputs.only, NAMES, QUICK, inputs)
    with scratch_folder(inputs) as scratch:
        bench = _bench(inputs.model or smollm2_folder(scratch), scratch, inputs)
        rows = [bench.plain()]
        rows += [bench.ours(SETTINGS[name]) for name in names if name in SETTINGS]
        healed = [name for name in names if name in (*HEALED, *ROADS) and name in inputs.only]  # they take long
        if inputs.heal_minutes is not None and not healed:
            healed = [next(iter(HEALED))]
        rows += [bench.healed(name, inputs.heal_minutes or 0.0) for name in healed]
        rows += [bench.other(name) for name in names if name in OTHERS]
        if LLAMA in names and inputs.model is None:
            rows += llama_rows(smollm2_file(), scratch, bench.judge)
    return rows


def _bench(dense: Path, scratch: Path, inputs: Inputs) -> _Bench:
    train, held_out = write_split(scratch)
    text = EvalData(inputs.text or held_out, samples=SEQUENCES, seq_length=LENGTH)
    data = TextData(inputs.train_text or train, samples=SAMPLES, seq_length=LENGTH)
    return _Bench(dense, scratch, TokenJudge(dense, text, scratch), data)


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
