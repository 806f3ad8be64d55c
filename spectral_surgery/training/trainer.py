"""Training with transformers' Trainer; adapters are saved alone, and complete under DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.errors import required
from spectral_surgery.files.peft.adapter_files import read_adapter, write_adapter
from spectral_surgery.live.attach import assign, state_of
from spectral_surgery.live.running import running
from spectral_surgery.text.tasks import Features, Task
from spectral_surgery.training.settings import TrainSettings

CHECKPOINTS = "checkpoints"
LOGS = "runs"  # of TensorBoard


@dataclass(frozen=True)
class History:
    """What training left behind.

    Attributes:
        train: (step, loss) of the training batches.
        held_out: (step, measures) of the held-out examples, the first before training.
        best_step: whose adapter was kept.
        is_main: whether this process is the one that writes and reports.
    """

    train: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, dict[str, float]], ...]
    best_step: int
    steps: int
    seconds: float
    is_main: bool

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json`` and the file of metrics."""
        return {
            "best_step": self.best_step,
            "steps": self.steps,
            "seconds": self.seconds,
            "train_loss": [list(row) for row in self.train],
            "held_out": [{"step": step, **measures} for step, measures in self.held_out],
        }


@dataclass(frozen=True)
class Job:
    """A training run, ready to start."""

    model: nn.Module
    tokenizer: Any
    task: Task
    settings: TrainSettings
    train: Sequence[Features]
    held_out: Sequence[Features]
    folder: Path
    progress: Callable[[int, int, str], None]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has sharded, gathered from all processes; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if callable(gather) else tensor


def run(job: Job, spec: AdapterSpec, *, resume: bool) -> tuple[History, AdapterState]:
    """Train an adapter, and return the one that did best on the held-out examples.

    Returns (what happened, the best adapter).
    """
    trainer = make_trainer(job, partial(_trainer_class, spec=spec))
    history, folder = run_trainer(job, trainer, "adapter_config.json", resume=resume)
    trainer.accelerator.wait_for_everyone()
    state = read_adapter(folder) if folder else state_of(job.model, spec, full=whole)
    return history, replace(state, spec=spec)


def run_trainer(job: Job, trainer: Any, file: str, *, resume: bool) -> tuple[History, Path | None]:
    """Let a Trainer train.

    Returns (what happened, checkpoint that did best on the held-out examples); None when there is no checkpoint.
    """
    checkpoint = _last_checkpoint(job.folder, file) if resume else None
    # not trainer.evaluate() here: accelerate would take the model for prepared, and processes would train apart
    trainer.args.eval_on_start = checkpoint is None
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log = trainer.state.log_history
    held_out = [(row["step"], _measures(row)) for row in log if "eval_loss" in row]
    best = trainer.state.best_model_checkpoint
    folder = Path(best) if best else _last_checkpoint(job.folder, file)
    history = History(
        tuple((row["step"], row["loss"]) for row in log if "loss" in row),
        tuple(held_out),
        int(folder.name.rpartition("-")[2]) if folder else trainer.state.global_step,
        trainer.state.global_step,
        float(result.metrics["train_runtime"]),
        trainer.is_world_process_zero(),
    )
    return history, folder


def _measures(row: dict[str, Any]) -> dict[str, float]:
    skipped = ("eval_runtime", "eval_model_preparation_time", "eval_samples_per_second", "eval_steps_per_second")
    return {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_") and k not in skipped}


def _last_checkpoint(folder: Path, file: str) -> Path | None:
    """The newest checkpoint that was written completely: it has the file."""
    steps = sorted((folder / CHECKPOINTS).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in steps if (path / file).exists() and (path / "trainer_state.json").exists()]
    return complete[-1] if complete else None


def make_trainer(job: Job, class_of: Callable[[Job], Any]) -> Any:
    """A Trainer that is ready to start. Raises BackendError when transformers or accelerate is missing."""
    for library in ("transformers", "accelerate"):  # the Trainer needs the second one too, and says so less clearly
        required(library, "train")
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    model: Any = job.model
    if job.settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # the embeddings are frozen, and gradients must pass the first block
    callbacks: list[Any] = [_progress_callback(job)]
    if job.settings.patience:
        callbacks.append(EarlyStoppingCallback(job.settings.patience))
    trainer = class_of(job)(
        model=job.model,
        args=_arguments(job),
        data_collator=lambda features: job.task.collate(job.tokenizer, features),
        train_dataset=list(job.train),
        eval_dataset=list(job.held_out),
        compute_metrics=lambda output: (
            job.task.measures(output.predictions, output.label_ids) if job.task.labelled else {}
        ),
        callbacks=callbacks,
    )
    for unwanted in (PrinterCallback, ProgressCallback):  # they write to stdout, which is for results
        trainer.remove_callback(unwanted)
    if trainer.is_world_process_zero():
        _log_to_tensorboard(trainer, job.folder / LOGS)
    return trainer


def _log_to_tensorboard(trainer: Any, folder: Path) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return  # an extra; losses are in the metrics file too
    from transformers.integrations import TensorBoardCallback

    trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder))))


def _arguments(job: Job) -> Any:
    from transformers import TrainingArguments

    settings = job.settings
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    when = (
        {"strategy": "steps", "steps": settings.eval_every}
        if settings.eval_every
        else {"strategy": "epoch", "steps": 500}
    )
    arguments = TrainingArguments(
        output_dir=str(job.folder / CHECKPOINTS),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type=settings.scheduler,
        max_grad_norm=settings.max_grad_norm,
        eval_strategy=when["strategy"],
        eval_steps=when["steps"],
        save_strategy=when["strategy"],
        save_steps=when["steps"],
        logging_steps=10 if settings.steps == 0 or settings.steps > 100 else 1,
        logging_first_step=True,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=job.task.best,
        greater_is_better=job.task.larger_is_better,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=on_cpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=not job.task.labelled,
        dataloader_pin_memory=not on_cpu,
        report_to=[],
        disable_tqdm=True,
    )
    of_process = max(1, settings.batch_size // (arguments.world_size * settings.gradient_accumulation))
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = of_process
    return arguments


def _progress_callback(job: Job) -> Any:
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        loss = ""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002 - as the Trainer calls it
            if logs and "loss" in logs:
                self.loss = f"loss {logs['loss']:.4f}"
            elif logs and f"eval_{job.task.best}" in logs:
                self.loss = f"held-out {job.task.best} {logs[f'eval_{job.task.best}']:.4f}"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - as the Trainer calls it
            if state.is_world_process_zero:
                job.progress(state.global_step, state.max_steps, self.loss)

    return Report()


def _trainer_class(job: Job, spec: AdapterSpec) -> Any:
    from transformers import Trainer

    class AdapterTrainer(Trainer):  # type: ignore[misc]
        """A Trainer that saves and loads adapters, trains heads at another rate, and knows our losses."""

        optimizer: Any

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            with running(job.model):
                if job.task.loss is None:
                    return super().compute_loss(model, inputs, return_outputs=return_outputs, **more)
                loss, predictions = job.task.loss(model, inputs)
            return (loss, {"loss": loss, "logits": predictions}) if return_outputs else loss

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
                adapter = [p for name, p in named if ".adapters." in name]
                head = [p for name, p in named if ".adapters." not in name]
                groups = [{"params": adapter, "lr": job.settings.learning_rate}]
                groups += [{"params": head, "lr": job.settings.head_learning_rate}] if head else []
                self.optimizer = torch.optim.AdamW(groups, weight_decay=job.settings.weight_decay)
            return self.optimizer

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            state = state_of(self.accelerator.unwrap_model(self.model), spec, full=whole)  # all processes gather
            if self.args.should_save:
                write_adapter(state, Path(output_dir or self.args.output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            assign(self.accelerator.unwrap_model(model or self.model), read_adapter(Path(resume_from_checkpoint)))

        def _load_best_model(self) -> None:
            """Nothing: the adapter is taken from the checkpoint, not from the model."""

    return AdapterTrainer
