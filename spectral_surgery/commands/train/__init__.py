"""train: an adapter for a model from a file of text, with all one wants to know afterwards written down."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.cards.check import METRICS_FILE
from spectral_surgery.cards.command_line import train_command
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.atomic import replace_file
from spectral_surgery.files.index import refuse_adapter
from spectral_surgery.files.peft.adapter_files import TENSOR_FILE, write_adapter
from spectral_surgery.hf.load_errors import check_utf8
from spectral_surgery.hf.models import load_classifier, load_model
from spectral_surgery.live.attach import inject, trainable_parameters
from spectral_surgery.live.heads import trained_heads
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.examples import Example, read_examples, split_examples
from spectral_surgery.text.settings import TrainData
from spectral_surgery.text.tasks import TASKS, Features, Task
from spectral_surgery.training.plot import plot_training
from spectral_surgery.training.settings import TrainSettings
from spectral_surgery.training.trainer import CHECKPOINTS, History, Job, run

PLOT_FILE = "loss.png"


@dataclass(frozen=True)
class TrainReport:
    """What a training did.

    Attributes:
        examples: trained on, held out.
        new_weights: names of weights that the model did not have, or for other labels, and that began at random.
    """

    task: str
    best: str
    history: History
    trainable_parameters: int
    all_parameters: int
    adapter_bytes: int
    examples: tuple[int, int]
    new_weights: tuple[str, ...] = ()

    @property
    def before(self) -> dict[str, float]:
        """Measures of the untrained model on the held-out examples; empty after a resumed run."""
        return next((dict(measures) for step, measures in self.history.held_out if step == 0), {})

    @property
    def after(self) -> dict[str, float]:
        """Measures of the adapter that was kept."""
        rows = [dict(measures) for step, measures in self.history.held_out if step == self.history.best_step]
        return rows[-1] if rows else {}

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json`` and the file of metrics."""
        return {
            "task": self.task,
            "decided_by": self.best,
            "before": self.before,
            "after": self.after,
            "trainable_parameters": self.trainable_parameters,
            "all_parameters": self.all_parameters,
            "adapter_bytes": self.adapter_bytes,
            "new_weights": list(self.new_weights),
            "examples": {"train": self.examples[0], "held_out": self.examples[1]},
            **self.history.to_json(),
        }


def train(
    base: Path,
    out: Path,
    data: TrainData,
    spec: AdapterSpec,
    settings: TrainSettings = TrainSettings(),  # noqa: B008 - frozen
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> TrainReport:
    """Train an adapter and write it to a folder in PEFT's format, with metrics and a plot of the loss beside it.

    Runs under torchrun and accelerate launch as it is; the main process writes.

    Raises:
        ConfigError: when data or settings do not fit.
        CheckpointError: when the model cannot be loaded, or out is taken.
        TargetError: when no module matches.
    """
    refuse_adapter(base)
    check_out(out, resume=resume, overwrite=overwrite)
    train_on, held_out = _examples(data)
    task = TASKS[data.task] if data.task else _guess(train_on)
    classes = _classes(task, train_on, held_out)
    settings = replace(settings, learning_rate=settings.learning_rate or spec.method.learning_rate)
    set_seed(settings.seed)
    model, tokenizer, new = _load(base, task, classes, settings, trust_remote_code=data.trust_remote_code)
    spec = replace(spec, task_type=spec.task_type or task.task_type, targets=_with_head(spec, model, task))
    spec = inject(model, spec)
    features = [_encode(task, tokenizer, part, classes, data.seq_length) for part in (train_on, held_out)]
    job = Job(model, tokenizer, task, settings, features[0], features[1], out, progress)
    history, state = run(job, spec, resume=resume)
    trained, everything = trainable_parameters(model)
    if history.is_main:
        write_adapter(state, out)
    size = (out / TENSOR_FILE).stat().st_size if (out / TENSOR_FILE).exists() else 0
    counts = (len(features[0]), len(features[1]))
    report = TrainReport(task.name, task.best, history, trained, everything, size, counts, new)
    if history.is_main:
        command = train_command(spec, task.name, settings, data.to_json())
        asked = {"command": command, "settings": asdict(settings), "method": spec.method.name, "data": data.to_json()}
        settled = {**asked, **report.to_json()}
        replace_file(out / METRICS_FILE, (json.dumps(settled, indent=2) + "\n").encode())
        plot_training(history.train, history.held_out, task.best, history.best_step, out / PLOT_FILE)
    return report


def _load(
    base: Path, task: Task, classes: Sequence[str], settings: TrainSettings, *, trust_remote_code: bool
) -> tuple[Any, Any, tuple[str, ...]]:
    """The model, its tokenizer, and the names of its weights that begin at random."""
    dtype = torch.bfloat16 if settings.bf16 and task.name == "causal-lm" else torch.float32
    if task.labelled and not task.loss:
        return load_classifier(base, classes or 1, dtype=dtype, trust_remote_code=trust_remote_code)
    return *load_model(base, task.auto_class, dtype=dtype, trust_remote_code=trust_remote_code), ()


def check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Accept a folder to train in, and discard old checkpoints in it where that is asked for.

    Raises:
        CheckpointError: when it is not empty and nothing was said.
        ConfigError: when Python could not read its name: logs and tokenizers could not be written there.
    """
    check_utf8(out, str(out))
    if not out.exists() or not any(out.iterdir()) or resume:
        return
    if not overwrite:
        raise CheckpointError(
            f"{out}: expected a new or empty folder, got one with content. Use --resume to go on with it, or"
            " --overwrite to discard it."
        )
    if (out / CHECKPOINTS).exists():
        shutil.rmtree(out / CHECKPOINTS)


def _examples(data: TrainData) -> tuple[list[Example], list[Example]]:
    examples = read_examples(data.file, data.columns)
    if data.eval_file:
        return examples, read_examples(data.eval_file, data.columns)
    train_on, held_out = split_examples(examples, data.eval_fraction)
    return train_on, held_out


def _guess(examples: Sequence[Example]) -> Task:
    labels = {example.label for example in examples}
    if labels == {None}:
        return TASKS["causal-lm"]
    whole = all(isinstance(label, str) or label == round(float(label or 0)) for label in labels)
    return TASKS["classification" if whole and len(labels) <= max(2, len(examples) // 10) else "regression"]


def _classes(task: Task, *parts: Sequence[Example]) -> list[str]:
    """Names of the classes, sorted; empty where labels are numbers or there are none."""
    labels = [example.label for part in parts for example in part]
    if task.labelled and any(label is None for label in labels):
        raise ConfigError(f"--task {task.name}: expected a label in the last column, got none.")
    if task.name == "classification":
        return sorted({_label_name(label) for label in labels})
    if task.labelled and any(isinstance(label, str) for label in labels):
        wrong = next(label for label in labels if isinstance(label, str))
        raise ConfigError(f"--task {task.name}: expected numbers as labels, got '{wrong}'.")
    return []


def _label_name(label: float | str | None) -> str:
    return str(int(label)) if isinstance(label, float) and label == int(label) else str(label)


def _with_head(spec: AdapterSpec, model: Any, task: Task) -> Any:
    """The targets, with the fresh head of a classifier among the modules that are trained whole."""
    if task.auto_class != "AutoModelForSequenceClassification":
        return spec.targets
    saved = dict.fromkeys((*spec.targets.modules_to_save, *trained_heads(model, task.task_type)))
    return replace(spec.targets, modules_to_save=tuple(saved))


def _encode(
    task: Task, tokenizer: Any, examples: Sequence[Example], classes: Sequence[str], length: int
) -> list[Features]:
    features = task.encode(tokenizer, [example.texts for example in examples], length)
    if not task.labelled:
        return features
    numbers = {name: number for number, name in enumerate(classes)}
    labels: list[Any] = [numbers[_label_name(e.label)] if classes else float(e.label or 0) for e in examples]
    return [feature | {"labels": label} for feature, label in zip(features, labels, strict=True)]


def set_seed(seed: int) -> None:
    """Make everything random repeatable."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
