"""--minutes is kept: on a clock that the work itself moves, also when steps become slower on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run
from spectral_surgery.training.loop import Batch, LossCurve, Training, distillation, train, trained
from spectral_surgery.training.settings import DistillSettings

SETTINGS = {"patience": 0, "warmup_steps": 1, "learning_rate": 0.01}


class Machine:
    """A clock, and work on it: every run of a model takes half a step."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now, self.seconds, self.step = 0.0, seconds, 0

    def clock(self) -> float:
        return self.now

    def batch(self, step: int, rank: int) -> Batch:
        del rank
        self.step = step
        return {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(step))}

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        self.now += self.seconds(self.step) / 2
        return model(batch["x"])


def trained_on(
    machine: Machine, minutes: float, eval_every: int, *, held_out: int = 2, state: Path | None = None
) -> LossCurve:
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(requires_grad=False)
    work = Training(
        trained(student),
        distillation(machine.run, lambda y, wanted, _: (y - wanted).square().mean(), student, teacher),
        machine.batch,
        [{"x": torch.ones(1, 3)}] * held_out,
        state,
    )
    settings = DistillSettings(steps=0, minutes=minutes, eval_every=eval_every, **SETTINGS)
    return train(work, settings, lambda *_: None, machine.clock)


@pytest.mark.parametrize("eval_every", [5, 1000])
@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (lambda _: 1.0, (80, 120)),
        (lambda step: 1.0 if step < 10 else 2.0, (40, 64)),  # twice as slow from the tenth step on
        (lambda step: 2.0 if step < 10 else 1.0, (70, 108)),
        (lambda step: 10.0 if step == 0 else 1.0, (70, 110)),  # a slow start costs no more than it took
    ],
    ids=["steady", "slower", "faster", "slow start"],
)
def test_the_minutes_are_kept_within_a_tenth(
    seconds: Callable[[int], float], steps: tuple[int, int], eval_every: int
) -> None:
    machine = Machine(seconds)
    curve = trained_on(machine, 2.0, eval_every)
    assert machine.now == pytest.approx(120, rel=0.1)
    assert curve.seconds == pytest.approx(machine.now, abs=1e-6)
    assert curve.step == curve.steps == curve.held_out[-1][0]
    if eval_every == 1000:
        assert steps[0] <= curve.step <= steps[1]


def test_costly_evaluations_count(tmp_path: Path) -> None:
    machine = Machine(lambda step: 1.0 if step < 10 else 2.0)
    curve = trained_on(machine, 4.0, 10, held_out=15, state=tmp_path / "state.safetensors")
    assert machine.now == pytest.approx(240, rel=0.1)
    assert curve.held_out[-1][0] == curve.step


def test_one_step_is_done_where_none_fits() -> None:
    machine = Machine(lambda _: 100.0)
    assert trained_on(machine, 0.1, 1000).step == 1


def test_the_learning_rate_falls_with_the_time(tmp_path: Path) -> None:
    """The same state after the same time, on a machine with half as many steps: the rate is near its end in both."""
    rates: list[list[float]] = []
    for pace in (1.0, 2.0):
        machine, own = Machine(lambda _, pace=pace: pace), list[float]()
        torch.manual_seed(0)
        student = nn.Linear(3, 3)
        before = student.weight.detach().clone()

        def watch(*_: object, own: list[float] = own, student: nn.Linear = student) -> None:
            nonlocal before
            own.append(float((student.weight.detach() - before).abs().max()))
            before = student.weight.detach().clone()

        loss = distillation(machine.run, lambda y, wanted, _: (y - wanted).mean(), student, nn.Linear(3, 3))
        held_out, state = [{"x": torch.ones(1, 3)}], tmp_path / f"{pace}.safetensors"
        train(
            Training(trained(student), loss, machine.batch, held_out, state),
            DistillSettings(steps=0, minutes=1.0, eval_every=1000, **SETTINGS),
            watch,
            machine.clock,
        )
        rates.append(own)
    assert len(rates[0]) > 1.7 * len(rates[1])
    for own in rates:
        assert own[-1] < 0.1 * max(own)


@pytest.mark.parametrize("blocks", [False, True])
def test_of_heal_too(tmp_path: Path, bert: Path, text: Path, blocks: bool) -> None:
    pytest.importorskip("transformers")
    from spectral_surgery.commands.heal import heal
    from spectral_surgery.text.settings import TextData

    compress(bert, tmp_path / "sparse", CompressOptions(Target("density", 0.2)))
    seconds = 0.0

    def clock() -> float:
        return seconds

    def passes(*_: object) -> None:
        nonlocal seconds
        seconds += 1.0 if seconds < 10 else 2.0

    settings = DistillSettings(steps=0, minutes=1.0, eval_every=1000, warmup_steps=2)
    data = TextData(text, 0, 16, 4)
    report = heal(
        tmp_path / "sparse",
        bert,
        tmp_path / "out",
        data,
        settings,
        blocks=blocks,
        clock=clock,
        run=Run(progress=passes),
    )
    assert seconds == pytest.approx(60, rel=0.1)
    assert 28 <= report.curve.step <= 38
