"""--minutes is kept: on a clock that the work itself moves, also when steps become slower on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.heal.whole_model import HealSession
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.training.loop import Batch, LossCurve, Training, _Run, distillation, train, trained
from spectral_surgery.training.settings import DistillSettings

MATRICES = 14  # of the model that is healed
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


class Costs:
    """A clock that moves by what each part of healing costs, times how slow the machine is by then."""

    def __init__(self, patch: pytest.MonkeyPatch, slowness: Callable[[float], float], read: float = 30.0) -> None:
        self.now, self.slowness, self.parts = 0.0, slowness, list[str]()
        for owner, name, seconds in (
            (EncodedSpectrum, "decode", read / MATRICES),
            (_Run, "_loss", 2.0),  # of a batch, to be judged or trained on
            (nn.utils, "clip_grad_norm_", 2.0),  # once a step
            (HealSession, "leave", 12.0 / MATRICES),
        ):
            patch.setattr(owner, name, self.costing(name, seconds, getattr(owner, name)))

    def clock(self) -> float:
        return self.now

    def costing(self, name: str, seconds: float, what: Callable[..., object]) -> Callable[..., object]:
        def costly(*args: object, **more: object) -> object:
            self.now += seconds * self.slowness(self.now)
            self.parts.append(name)
            return what(*args, **more)

        return costly


def healed_on(costs: Costs, folder: Path, bert: Path, text: Path, minutes: float, *, blocks: bool = False) -> None:
    from spectral_surgery.commands.heal import heal
    from spectral_surgery.text.settings import TextData

    compress(bert, folder / "sparse", CompressOptions(Target("density", 0.2)))
    costs.now, costs.parts = 0.0, []
    settings = DistillSettings(steps=0, minutes=minutes, eval_every=1000, warmup_steps=2, patience=0)
    data = TextData(text, 0, 16, 4)
    heal(folder / "sparse", bert, folder / "out", data, settings, blocks=blocks, clock=costs.clock)


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    "slowness",
    [lambda _: 1.0, lambda now: 1.0 if now < 100 else 2.0, lambda now: 2.0 if now < 100 else 1.0],
    ids=["steady", "slower", "faster"],
)
def test_heal_reads_judges_trains_and_leaves_within_the_minutes(
    tmp_path: Path,
    bert: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    slowness: Callable[[float], float],
    blocks: bool,
) -> None:
    costs = Costs(monkeypatch, slowness)
    healed_on(costs, tmp_path, bert, text, 5.0, blocks=blocks)
    assert costs.now < 1.1 * 300
    assert costs.now > (0.85 if slowness(0) > 1 else 0.9) * 300  # what comes last was measured where all was slow


def test_held_out_text_is_judged_as_far_as_the_minutes_allow(
    tmp_path: Path, bert: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []
    for minutes in (1.5, 30.0):
        costs = Costs(monkeypatch, lambda _: 1.0)
        healed_on(costs, tmp_path / str(minutes), bert, text, minutes)
        steps = costs.parts.count("clip_grad_norm_")
        assert (costs.parts.count("_loss") - steps) % 2 == 0  # as many at the end as at the start
        judged.append((costs.parts.count("_loss") - steps) // 2)
        monkeypatch.undo()
    assert judged[0] < judged[1]


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_minutes_that_cannot_be_kept_are_refused_before_the_first_step(
    tmp_path: Path, bert: Path, text: Path, monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    costs = Costs(monkeypatch, lambda _: 1.0)
    with pytest.raises(ConfigError, match=r"--minutes: expected 1(\.\d)? or more for this model .* got 0\.6: "):
        healed_on(costs, tmp_path, bert, text, 0.6, blocks=blocks)
    assert "clip_grad_norm_" not in costs.parts
    assert not (tmp_path / "out").exists()
