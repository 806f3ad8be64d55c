"""train --init: a language model from nothing but a text, beside what it has to be better than."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spectral_surgery.cards.check import METRICS_FILE
from spectral_surgery.commands.train import PLOT_FILE, check_out, set_seed
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.atomic import replace_file
from spectral_surgery.hf.models import load_tokenizer
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.examples import read_examples, split_examples
from spectral_surgery.text.settings import ScratchData
from spectral_surgery.text.tasks import TASKS, Features
from spectral_surgery.training.plot import plot_training
from spectral_surgery.training.pretrain import (
    STARTS,
    prediction_scores,
    require_transformers,
    train_whole,
    unigram,
    vocabulary_of,
)
from spectral_surgery.training.settings import FROM_SCRATCH, SCRATCH_RATE, ModelSizes, TrainSettings
from spectral_surgery.training.tokenizers import learn_bpe, tiktoken_named
from spectral_surgery.training.trainer import History, Job

CONTROL = "control"  # folder of the second model
TIKTOKEN = "tiktoken:"
_TASK = TASKS["causal-lm"]


@dataclass(frozen=True)
class Trained:
    """One model and how it did."""

    start: str
    folder: Path
    parameters: int
    history: History
    test: dict[str, float]

    @property
    def validation_loss(self) -> float:
        """Of the weights that were kept."""
        losses = [measures["loss"] for step, measures in self.history.held_out if step == self.history.best_step]
        return losses[-1] if losses else float("nan")

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json`` and the file of metrics."""
        return {
            "init": self.start,
            "parameters": self.parameters,
            "test": self.test,
            "validation_loss": self.validation_loss,
            **self.history.to_json(),
        }


@dataclass(frozen=True)
class ScratchReport:
    """What a training from nothing did.

    Attributes:
        models: the one asked for and, with a control, that.
        unigram: measures on the test part of the mere frequencies of tokens.
        examples: trained on, validated on, tested on.
    """

    models: tuple[Trained, ...]
    unigram: dict[str, float]
    vocabulary: int
    examples: tuple[int, int, int]

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.models[0].history.is_main

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        parts = dict(zip(("train", "validation", "test"), self.examples, strict=True))
        return {
            "models": [model.to_json() for model in self.models],
            "unigram": self.unigram,
            "vocabulary": self.vocabulary,
            "examples": parts,
        }


def train_from_scratch(
    start: str,
    out: Path,
    data: ScratchData,
    sizes: ModelSizes = ModelSizes(),  # noqa: B008 - frozen
    settings: TrainSettings = FROM_SCRATCH,
    *,
    control: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ScratchReport:
    """Train a language model and write it, its tokenizer, metrics and a plot of the loss to a folder.

    Raises:
        ConfigError: when data or settings do not fit.
        CheckpointError: when out is taken, or there is no such tokenizer.
    """
    require_transformers()
    names = [start, *([control] if control else [])]
    rows = [STARTS[name] for name in names]
    folders = [out, out / CONTROL][: len(rows)]
    for folder in folders:
        check_out(folder, resume=resume, overwrite=overwrite)
    length, longest = data.seq_length, sizes.max_seq_length or data.seq_length
    if length > longest:
        raise ConfigError(f"--seq-length: expected at most --max-seq-length, {longest}, got {length}.")
    sizes = replace(sizes, max_seq_length=longest, kernel_length=sizes.kernel_length or length)
    tokenizer, parts = _prepare(data)
    vocabulary = vocabulary_of(tokenizer)
    rate = settings.learning_rate or SCRATCH_RATE
    settings = replace(settings, learning_rate=rate, head_learning_rate=rate, eval_every=_eval_every(settings))
    trained = []
    for row, folder in zip(rows, folders, strict=True):
        set_seed(settings.seed)
        model = row.build(sizes, vocabulary)
        job = Job(model, tokenizer, _TASK, settings, parts[0], parts[1], folder, progress)
        trained.append(_trained(row.name, job, parts[2], resume=resume))
    known = unigram(parts[0], parts[2], vocabulary["vocab_size"])
    counts = (len(parts[0]), len(parts[1]), len(parts[2]))
    report = ScratchReport(tuple(trained), known, vocabulary["vocab_size"], counts)
    if report.is_main:
        of_data = asdict(data) | {"file": str(data.file)}
        _write(report, {"data": of_data, "settings": asdict(settings), "sizes": asdict(sizes)})
    return report


def _trained(start: str, job: Job, test: list[Features], *, resume: bool) -> Trained:
    """Train one model, judge and save it."""
    history = train_whole(job, resume=resume)
    model: Any = job.model
    measures = prediction_scores(model, test, job.settings.batch_size)
    if history.is_main:
        model.save_pretrained(job.folder)
        job.tokenizer.save_pretrained(job.folder)
    return Trained(start, job.folder, model.num_parameters(), history, measures)


def _prepare(data: ScratchData) -> tuple[Any, list[list[Features]]]:
    """The tokenizer, and the tokens of the three parts."""
    parts = split_examples(read_examples(data.file, data.columns), data.validation_fraction, data.test_fraction)
    tokenizer = _tokenizer(data, "\n".join(example.texts[0] for example in parts[0]))
    return tokenizer, [_TASK.encode(tokenizer, [example.texts for example in part], data.seq_length) for part in parts]


def _tokenizer(data: ScratchData, text: str) -> Any:
    if data.tokenizer is None:
        return learn_bpe(text, data.vocabulary)
    if data.tokenizer.startswith(TIKTOKEN):
        return tiktoken_named(data.tokenizer.removeprefix(TIKTOKEN))
    return load_tokenizer(Path(data.tokenizer))


def _eval_every(settings: TrainSettings) -> int:
    """At least one evaluation, or no weights would be kept as the best."""
    return min(settings.eval_every, settings.steps) if settings.steps else settings.eval_every


def _write(report: ScratchReport, how: Mapping[str, object]) -> None:
    for model in report.models:
        body = {**how, **report.to_json(), "models": [model.to_json()]}
        if model is report.models[0]:
            body["models"] = [trained.to_json() for trained in report.models]
        replace_file(model.folder / METRICS_FILE, (json.dumps(body, indent=2) + "\n").encode())
        history = model.history
        plot_training(history.train, history.held_out, "loss", history.best_step, model.folder / PLOT_FILE)
