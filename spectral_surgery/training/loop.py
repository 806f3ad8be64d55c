"""The loop that heal and swap train with: some parameters, until a loss is small on batches that are held out.

Batches are a function of the step, and unfinished work is on the disk after every evaluation, so that a run that was
cut off ends as one that was not. Several processes take different batches and average their gradients; not by
DistributedDataParallel, which wraps one module with one forward, while what is trained here are parameters, on losses
that see several models, single blocks, and other experts in every process.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectral_surgery.distributed import average, rank, world
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.writer import tensor_entry, write_file
from spectral_surgery.live.running import differentiating, fast_bfloat16, not_differentiable
from spectral_surgery.progress import Progress
from spectral_surgery.training.settings import DistillSettings
from spectral_surgery.training.time_limit import TimeLimit

Batch = dict[str, Tensor]
Clock = Callable[[], float]  # seconds since some moment
_TOLD = 4  # steps, after which their pace is told
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


@dataclass
class LossCurve:
    """How a training went.

    Attributes:
        steps: planned; with minutes, as many as are expected to fit.
        train: (step, mean loss since the last evaluation).
        held_out: (step, loss); step 0 is before training.
        best_step: the step whose parameters were kept.
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
class Pace:
    """What is known of a training after its first steps.

    Attributes:
        steps: that are planned, or fit into the minutes.
        seconds: of a step, with its share of the evaluations.
        before: held-out loss before training; not finite without held-out batches.
    """

    steps: int
    seconds: float
    before: float


def _unheard(pace: Pace) -> None:
    pass


def _ready(gone: float, least: float) -> None:
    pass


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        parameters: by name, on one device.
        loss: of a batch, a scalar; see `distillation`.
        batch: of a step, counted from 0, and a process.
        held_out: batches that nothing is trained on; without any, the last parameters are kept and not the best.
        state_file: unfinished work; None to keep none.
        key: what decides the result: work of another key is not taken up.
        fitted: whether the parameters were fitted to text before; a learning rate that is not set is then smaller.
        refresh: sets what is derived from the parameters, before they are judged and when they are final.
        needed: parameters of which one at least must get a gradient.
        told: called once, after the first steps, with what they took.
        began: on the clock, when the minutes began; None for when the training does.
        after: seconds that the minutes have to leave for what comes after the training.
        ready: with minutes, called before the first step with the seconds that are gone, and those that it takes at
            least from then on, and after it; raises where that is too much.
    """

    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[Batch], Tensor]
    batch: Callable[[int, int], Batch]
    held_out: Sequence[Batch] = ()
    state_file: Path | None = None
    key: str = ""
    fitted: bool = False
    refresh: Callable[[], None] = lambda: None
    needed: Sequence[Tensor] = ()
    told: Callable[[Pace], None] = _unheard
    began: float | None = None
    after: float = 0.0
    ready: Callable[[float, float], None] = _ready


def distillation(
    run: Callable[[nn.Module, Batch], Any],
    loss: Callable[[Any, Any, Batch], Tensor],
    student: nn.Module,
    teacher: nn.Module,
) -> Callable[[Batch], Tensor]:
    """The loss of a student on a batch, from its outputs and those of its teacher."""

    def of(batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = run(teacher, batch)
        return loss(run(student, batch), wanted, batch)

    return of


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(work: Training, settings: DistillSettings, progress: Progress, clock: Clock = time.perf_counter) -> LossCurve:
    """Train; the parameters end as they were when the held-out loss was least.

    Raises:
        ConfigError: when the loss is not finite.
        CheckpointError: when unfinished work is there, but of another run.
        TargetError: when autograd cannot follow the model.
    """
    return _Run(work, settings, progress, clock).all()


class _Run:
    def __init__(self, work: Training, settings: DistillSettings, progress: Progress, clock: Clock) -> None:
        self.work, self.settings, self.progress, self.clock = work, settings, progress, clock
        self.parameters = work.parameters
        self.learning_rate = settings.rate(fitted=work.fitted)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=self.learning_rate, betas=(0.9, 0.99))
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()} if work.held_out else {}
        self.curve, self.judged = LossCurve(), list[float]()  # losses of single batches at the best step
        self.earlier, self.began = 0.0, clock() if work.began is None else work.began  # seconds of the runs before
        self.timed = not settings.steps
        after = float(average(torch.tensor(work.after, dtype=torch.float64))) if self.timed else 0.0
        self.limit = TimeLimit(60 * settings.minutes if self.timed else math.inf, after, settings.eval_every)
        self.started, self.told = 0.0, False  # seconds before the first step

    def all(self) -> LossCurve:
        if self._resumed():
            self.earlier = self.curve.seconds
        else:
            self._begin()
        self.started, losses = self._now(), list[float]()
        last = self.started
        while self.curve.step < self.curve.steps and not self._stopped():
            losses.append(self._step())
            self.curve.step += 1
            before, last = last, self._now()
            self.limit.stepped(last - before)
            self._plan()
            self._tell()
            self.progress(self.curve.step, self.curve.steps, f"loss {losses[-1]:.4f}")
            if self.curve.step % self.settings.eval_every == 0 or self.curve.step == self.curve.steps:
                self._evaluate(losses)
                losses = []
                before, last = last, self._now()
                self.limit.judged(last - before)
                self._plan()
                if not self.timed or self.curve.step < self.curve.steps:  # else the result is written next
                    self._save()
                before, last = last, self._now()
                self.limit.saving = last - before
        if not self.best or self.curve.best_step != self.curve.step:
            with torch.no_grad():
                for name, values in self.best.items():
                    self.parameters[name].copy_(values)
            self.work.refresh()
        return self.curve

    def _begin(self) -> None:
        """Judge what is there before the first step: with minutes, on as many batches as a part of them allows."""
        self.curve.steps, before = self.settings.steps or 1, self._now()
        if self.work.held_out:
            self.judged = self._losses(until=before + self.limit.for_judging(before))
            self.curve.held_out.append((0, sum(self.judged) / len(self.judged)))
            self.limit.judged(self._now() - before)
        if self.timed:
            now = self._now()
            self.work.ready(now, self.limit.least)

    def _now(self) -> float:
        """Seconds that are gone, the same in all processes where steps depend on it."""
        now = torch.tensor(self.earlier + self.clock() - self.began, dtype=torch.float64)
        self.curve.seconds = float(average(now) if self.timed else now)
        return self.curve.seconds

    def _plan(self) -> None:
        if self.timed and self.limit.each > 0:
            self.curve.steps = self.curve.step + self.limit.steps(self._now())

    def _tell(self) -> None:
        if not self.told and (self.curve.step >= min(_TOLD, self.curve.steps)):
            self.told = True
            before = self.curve.held_out[0][1] if self.curve.held_out else math.nan
            self.work.told(Pace(self.curve.steps, self.limit.each, before))

    def _step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.work.batch(self.curve.step, rank()))
        with differentiating(loss):
            loss.backward()
        if self.work.needed and not self.curve.step and all(values.grad is None for values in self.work.needed):
            raise not_differentiable("they are computed under torch.no_grad")
        value = float(average(loss.detach().clone()))
        if not math.isfinite(value):
            raise ConfigError(
                f"distil: expected a finite loss, got {value} at step {self.curve.step + 1}. Lower the learning rate,"
                " or check the text."
            )
        if world() > 1:
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        return value

    def _rate(self) -> float:
        warm = (self.curve.step + 1) / max(self.settings.warmup_steps, 1)
        done = self.curve.step / max(self.curve.steps, 1)
        if not self.settings.steps:
            done = min(1.0, (self.curve.seconds - self.started) / max(self.limit.seconds - self.started, 1e-9))
        return min(warm, 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def _loss(self, batch: Batch) -> Tensor:
        device = next(iter(self.parameters.values())).device
        asked = self.settings.bf16
        enabled = fast_bfloat16(device.type) if asked is None else asked
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            return self.work.loss({name: tensor.to(device) for name, tensor in batch.items()})

    def _losses(self, until: float) -> list[float]:
        """Of held-out batches, the same ones as before the first step; of the first ones alone where time runs out."""
        losses, before = list[float](), self._now()
        with torch.no_grad(), parametrize.cached():  # what is trained stays as it is: weights are computed once
            for batch in self.work.held_out[: len(self.judged) or None]:
                losses.append(float(self._loss(batch)))
                now = self._now() if self.timed else before
                self.limit.batch = self.limit.batch or now - before
                if now + (now - before) / len(losses) > until:
                    break
        return losses

    def _evaluate(self, losses: Sequence[float]) -> None:
        self.curve.train.append((self.curve.step, sum(losses) / max(len(losses), 1)))
        if not self.work.held_out:
            self.curve.best_step = self.curve.step
            return
        self.work.refresh()
        found = self._losses(until=self.limit.seconds - self.limit.after)
        seen = [*found, *self.judged[len(found) :]]  # what there was no time for counts as it was
        loss = sum(seen) / len(seen)
        if loss < self.curve.best:
            self.curve.best_step, self.judged = self.curve.step, seen
            for name, parameter in self.parameters.items():
                self.best[name].copy_(parameter.detach())
        self.curve.held_out.append((self.curve.step, loss))

    def _stopped(self) -> bool:
        since = sum(1 for step, _ in self.curve.held_out if step > self.curve.best_step)
        return bool(self.settings.patience) and since >= self.settings.patience

    def _average_gradients(self) -> None:
        """Also of parameters that one process alone has gradients for, such as experts that no token came to."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        flat = average(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _save(self) -> None:
        if self.work.state_file is None or rank():
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors |= {f"now.{name}": parameter.detach(), f"best.{name}": self.best.get(name, parameter.detach())}
            state = self.optimizer.state.get(parameter, {})  # none where no gradient ever came
            tensors |= {f"{key}.{name}": state[key] for key in _MOMENTS if key in state}
        body = {
            "key": self.work.key,
            "curve": json.dumps(asdict(self.curve)),
            "judged": json.dumps([self.limit.judging, self.judged]),
        }
        fresh = self.work.state_file.with_suffix(".new")
        entries = [tensor_entry(key, tensor.cpu().contiguous()) for key, tensor in tensors.items()]
        write_file(fresh, entries, metadata=body)
        fresh.replace(self.work.state_file)

    def _resumed(self) -> bool:
        file = self.work.state_file
        if file is None or not file.exists():
            return False
        try:
            with safe_open(file, "pt") as state:
                metadata = state.metadata() or {}
                tensors = {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118 - a reader, not a dict
        except SafetensorError as error:
            raise CheckpointError(
                f"{file}: expected unfinished work, got an error ({error}). Use --overwrite to discard it."
            ) from None
        if metadata.get("key") != self.work.key:
            raise CheckpointError(
                f"{file}: expected work of these models, text and settings, got others. Use --overwrite to discard it."
            )
        self.curve = _curve(json.loads(metadata["curve"]))
        self.limit.judging, self.judged = json.loads(metadata["judged"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"now.{name}"])
                if name in self.best:
                    self.best[name].copy_(tensors[f"best.{name}"])
                moments = {
                    key: tensors[f"{key}.{name}"].to(parameter.device) for key in _MOMENTS if f"{key}.{name}" in tensors
                }
                if moments:
                    self.optimizer.state[parameter] = {"step": torch.tensor(float(self.curve.step)), **moments}
        self.work.refresh()
        return True


def _curve(body: Mapping[str, Any]) -> LossCurve:
    pairs = {key: [(int(step), float(loss)) for step, loss in body[key]] for key in ("train", "held_out")}
    return LossCurve(**{**body, **pairs})
