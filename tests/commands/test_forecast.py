"""What heal says before it goes on: steps that fit, what they bring, and what to do where that is not enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectral_surgery.commands.heal.forecast import USABLE, Forecast
from spectral_surgery.training.loop import Pace
from tests.support.command import run


@pytest.mark.parametrize(("before", "steps", "after"), [(1.91, 20, 0.56), (1.91, 60, 0.29), (13.5, 28, 3.4)], ids=str)
def test_the_law_is_near_what_was_measured_without_calibration(before: float, steps: int, after: float) -> None:
    expected = Forecast(Pace(steps, 1.0, before), untouched=True, tokens=True).expected
    assert expected == pytest.approx(after, rel=0.15)


def test_a_hopeless_budget_is_told_with_what_would_do() -> None:
    forecast = Forecast(Pace(28, 55.0, 13.5), untouched=True, tokens=True)
    assert forecast.hopeless
    needed = forecast.steps_needed
    assert needed
    enough = Forecast(Pace(needed, 55.0, 13.5), untouched=True, tokens=True)
    assert enough.expected == pytest.approx(USABLE, rel=0.01)
    assert not enough.hopeless
    *_, warning = forecast.sentences()
    assert warning.startswith("warning: ")
    assert "--bits 3 --calibrate" in warning
    assert f"{needed} steps" in warning


def test_nothing_is_promised_after_calibration() -> None:
    forecast = Forecast(Pace(28, 55.0, 3.5), untouched=False, tokens=True)
    assert forecast.expected is None
    assert not forecast.hopeless
    pace, now = forecast.sentences()
    assert pace.startswith("28 steps of 55 s")
    assert now.startswith("held-out loss 3.5 nats a token now; ")


def test_other_losses_and_blocks_have_no_verdict() -> None:
    assert not Forecast(Pace(28, 1.0, 13.5), untouched=True, tokens=False).hopeless
    blocks = Forecast(Pace(3, 1.0, 0.5), untouched=True, tokens=True, blocks=30)
    assert blocks.expected is None
    assert list(blocks.sentences()) == ["3 steps of each of 30 blocks of 1 s, about 1.5 minutes"]


@pytest.mark.parametrize("more", [(), ("--blocks",)], ids=["whole", "blocks"])
def test_the_command_says_it_before_and_in_json(tmp_path: Path, bert: Path, text: Path, more: tuple[str, ...]) -> None:
    pytest.importorskip("transformers")
    assert run("compress", bert, tmp_path / "sparse", "--sparsity", "0.2").returncode == 0
    healing = ("--data", text, "--seq-length", "16", "--steps", "6", "--json")
    done = run("heal", tmp_path / "sparse", bert, tmp_path / "out", *healing, *more)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)["forecast"]
    assert body["steps"] == 6
    assert body["seconds_of_a_step"] > 0
    assert (body["expected_held_out"] is None) == bool(more)
    assert f"6 steps{' of each of 2 blocks' if more else ''} of " in done.stderr
