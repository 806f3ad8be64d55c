"""Distillation: some parameters of a student are trained until its outputs are those of its teacher.

Batches are a function of the step, and unfinished work is on the disk after every evaluation, so that a run that was
cut off ends as one that was not. Several processes take different batches and average their gradients.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn

from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.writer import tensor_entry, write_file
from spectral_surgery.live.running import differentiating, not_differentiable

Batch = dict[str, Tensor]
Outputs = Any
Loss = Callable[[Outputs, Outputs, Batch], Tensor]
Clock = Callable[[], float]  # seconds since some moment
_RECENT = 4  # steps whose mean says how long the next one takes
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True)
class DistillSettings:
    """How to distil.

    Attributes:
        steps: optimizer steps; 0 for as many as fit into the minutes.
        minutes: wall time of the training, evaluations included, when steps is 0: it ends with the step and the
            evaluation that fit, as long as the last few of them took.
        learning_rate: of Adam, in units of the parameters.
        warmup_steps: over which the rate rises; then it falls as a cosine of the steps, or of the time, to a twentieth.
        eval_every: steps between evaluations on held-out batches.
        patience: evaluations without improvement before stopping; 0 for never.
        max_grad_norm: gradients are cut to it.
        bf16: autocast to bfloat16.
        seed: of the batches.
    """

    steps: int = 400
    minutes: float = 0.0
    learning_rate: float = 0.03
    warmup_steps: int = 20
    eval_every: int = 50
    patience: int = 4
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: when the learning rate is not positive, or there are neither steps nor minutes.
        """
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate {self.learning_rate}: a positive number is accepted.")
        if self.steps < 1 and not self.minutes > 0:
            raise ConfigError(f"--steps {self.steps}: 1 or more is accepted, or --minutes.")


@dataclass
class Course:
    """How a distillation went.

    Attributes:
        steps: planned; with minutes, as many as are expected to fit.
        step: done.
        train: (step, mean loss since the last evaluation).
        held_out: (step, loss); step 0 is before training.
        best_step: the step whose parameters were kept.
        seconds: of all runs together.
    """

    steps: int = 0
    step: int = 0
    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> float:
        """The least held-out loss."""
        return min((loss for _, loss in self.held_out), default=math.inf)


@dataclass(frozen=True)
class Distillation:
    """Everything a distillation needs.

    Attributes:
        run: calls a model on a batch: (model, batch) to outputs.
        loss: (outputs of the student, of the teacher, batch) to a scalar.
        student: its parameters that require gradients are trained.
        teacher: frozen.
        batch: of a step, counted from 0, and a process.
        held_out: batches that nothing is trained on.
        state_file: unfinished work; None to keep none.
        key: what decides the result: work of another key is not taken up.
        settle: sets what the student derives from its parameters, before they are judged and when they are final.
        needed: parameters of which one at least must get a gradient.
    """

    run: Callable[[nn.Module, Batch], Outputs]
    loss: Loss
    student: nn.Module
    teacher: nn.Module
    batch: Callable[[int, int], Batch]
    held_out: Sequence[Batch]
    state_file: Path | None = None
    key: str = ""
    settle: Callable[[], None] = lambda: None
    needed: Sequence[Tensor] = ()


def distill(
    work: Distillation,
    settings: DistillSettings,
    progress: Callable[[int, int, str], None],
    clock: Clock = time.perf_counter,
) -> Course:
    """Train the student; its parameters end as they were when the held-out loss was least.

    Args:
        work: models, data and loss.
        settings: how.
        progress: called after each step.
        clock: tells the time.

    Returns:
        How it went.

    Raises:
        ConfigError: when the loss is not finite.
        CheckpointError: when unfinished work is there, but of another run.
        TargetError: when autograd cannot follow the student.
    """
    return _Run(work, settings, progress, clock).all()


class _Run:
    def __init__(
        self,
        work: Distillation,
        settings: DistillSettings,
        progress: Callable[[int, int, str], None],
        clock: Clock,
    ) -> None:
        self.work, self.settings, self.progress, self.clock = work, settings, progress, clock
        self.parameters = {name: p for name, p in work.student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99))
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.course = Course()
        self.rank, self.world = _place()
        self.earlier, self.began = 0.0, clock()  # seconds of the runs before; when this one began
        self.recent: deque[float] = deque(maxlen=_RECENT)  # seconds of steps
        self.judging = 0.0  # seconds of the last evaluation

    def all(self) -> Course:
        if not self._resumed():
            self.course.held_out.append((0, self._held_out()))
            self.judging = self._passed()
            self.course.steps = self.settings.steps or 1
        self.earlier, losses = self.course.seconds - (self.clock() - self.began), list[float]()
        while self.course.step < self.course.steps and not self._stopped():
            losses.append(self._step())
            self.course.step += 1
            self.recent.append(self._passed())
            self._plan()
            self.progress(self.course.step, self.course.steps, f"loss {losses[-1]:.4f}")
            if self.course.step % self.settings.eval_every == 0 or self.course.step == self.course.steps:
                self._evaluate(losses)
                losses = []
                self.judging = self._passed()
                self._plan()
                self._save()
                self.judging += self._passed()
        with torch.no_grad():
            for name, own in self.parameters.items():
                own.copy_(self.best[name])
        self.work.settle()
        return self.course

    def _passed(self) -> float:
        """Seconds since this was asked before, the same in all processes where steps depend on it."""
        before, now = self.course.seconds, self.earlier + self.clock() - self.began
        self.course.seconds = now if self.settings.steps else self._mean(torch.tensor(now, dtype=torch.float64))
        return self.course.seconds - before

    def _plan(self) -> None:
        """With minutes, as many steps as fit into what is left of them, with the evaluation at their end."""
        each = sum(self.recent) / len(self.recent) + self.judging / self.settings.eval_every
        if not self.settings.steps and each > 0:
            left = 60 * self.settings.minutes - self.course.seconds - self.judging
            self.course.steps = self.course.step + max(0, round(left / each))

    def _step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.work.batch(self.course.step, self.rank))
        with differentiating(loss):
            loss.backward()
        if self.work.needed and not self.course.step and all(own.grad is None for own in self.work.needed):
            raise not_differentiable("they are computed under torch.no_grad")
        value = self._mean(loss.detach())
        if not math.isfinite(value):
            raise ConfigError(
                f"distil: the loss is {value} at step {self.course.step + 1}; finite losses are accepted."
                " Lower the learning rate, or check the text."
            )
        if self.world > 1:
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        return value

    def _rate(self) -> float:
        warm = (self.course.step + 1) / max(self.settings.warmup_steps, 1)
        done = self.course.step / max(self.course.steps, 1)
        if not self.settings.steps:
            done = min(1.0, self.course.seconds / (60 * self.settings.minutes))
        return min(warm, 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def _loss(self, batch: Batch) -> Tensor:
        device = next(iter(self.parameters.values())).device
        batch = {name: own.to(device) for name, own in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bf16):
            with torch.no_grad():
                wanted = self.work.run(self.work.teacher, batch)
            return self.work.loss(self.work.run(self.work.student, batch), wanted, batch)

    def _held_out(self) -> float:
        with torch.no_grad():
            total = sum((self._loss(batch).float() for batch in self.work.held_out), torch.zeros(()))
        return float(total) / max(len(self.work.held_out), 1)

    def _evaluate(self, losses: Sequence[float]) -> None:
        self.work.settle()
        own = self._held_out()
        if own < self.course.best:
            self.course.best_step = self.course.step
            for name, p in self.parameters.items():
                self.best[name].copy_(p.detach())
        self.course.held_out.append((self.course.step, own))
        self.course.train.append((self.course.step, sum(losses) / max(len(losses), 1)))

    def _stopped(self) -> bool:
        since = sum(1 for step, _ in self.course.held_out if step > self.course.best_step)
        return bool(self.settings.patience) and since >= self.settings.patience

    def _mean(self, value: Tensor) -> float:
        if self.world > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.world
        return float(value)

    def _average_gradients(self) -> None:
        given = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in given])
        distributed.all_reduce(flat)
        flat /= self.world
        for grad, own in zip(given, torch.split(flat, [grad.numel() for grad in given]), strict=True):
            grad.copy_(own.view_as(grad))

    def _save(self) -> None:
        if self.work.state_file is None or self.rank:
            return
        tensors: dict[str, Tensor] = {}
        for name, own in self.parameters.items():
            tensors |= {f"now.{name}": own.detach(), f"best.{name}": self.best[name]}
            state = self.optimizer.state.get(own, {})  # none where no gradient ever came
            tensors |= {f"{key}.{name}": state[key] for key in _MOMENTS if key in state}
        body = {"key": self.work.key, "course": json.dumps(asdict(self.course))}
        fresh = self.work.state_file.with_suffix(".new")
        entries = [tensor_entry(key, own.cpu().contiguous()) for key, own in tensors.items()]
        write_file(fresh, entries, metadata=body)
        fresh.replace(self.work.state_file)

    def _resumed(self) -> bool:
        file = self.work.state_file
        if file is None or not file.exists():
            return False
        try:
            with safe_open(file, "pt") as state:
                metadata = state.metadata() or {}
                tensors = {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise CheckpointError(f"{file}: unfinished work cannot be read ({error}). Use --overwrite.") from None
        if metadata.get("key") != self.work.key:
            raise CheckpointError(f"{file}: is of other models, text or settings. Use --overwrite to discard it.")
        self.course = _course(json.loads(metadata["course"]))
        with torch.no_grad():
            for name, own in self.parameters.items():
                own.copy_(tensors[f"now.{name}"])
                self.best[name].copy_(tensors[f"best.{name}"])
                moments = {
                    key: tensors[f"{key}.{name}"].to(own.device) for key in _MOMENTS if f"{key}.{name}" in tensors
                }
                if moments:
                    self.optimizer.state[own] = {"step": torch.tensor(float(self.course.step)), **moments}
        self.work.settle()
        return True


def _course(body: Mapping[str, Any]) -> Course:
    pairs = {key: [(int(step), float(loss)) for step, loss in body[key]] for key in ("train", "held_out")}
    return Course(**{**body, **pairs})


def _place() -> tuple[int, int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
