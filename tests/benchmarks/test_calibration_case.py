"""The calibrate case refuses figures of wrong moments, and runs on a small model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.case import CheckFailedError
from benchmarks.cases import calibration
from benchmarks.language_model import Size
from spectral_surgery.calibration.block_streaming import LazyModel

SMALL = calibration.Load(Size(64, 128, 2, 64), 6, 16)


def test_rows_of_a_small_model() -> None:
    once, moments, native = calibration.measure(SMALL, rounds=2)
    assert (once["what"], once["/ forward"], once["met"]) == ("one forward pass", 1.0, "")
    for row in (moments, native):
        assert row["tokens"] == 96
        assert row["met"] == (float(str(row["/ forward"])) <= calibration.PASSES)
    assert str(native["what"]).startswith("the same, as --calibrate does")


def test_wrong_moments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = calibration.calibrate

    def wrong(lazy: LazyModel, sequences: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, torch.Tensor]:
        found = right(lazy, sequences, names)
        found["model.layers.1.mlp.down_proj.weight"].mul_(1.01)
        return found

    monkeypatch.setattr(calibration, "calibrate", wrong)
    with pytest.raises(CheckFailedError, match=r"moment of layers.1.mlp.down_proj differs .* are not shown"):
        calibration.measure(SMALL, rounds=2)
    monkeypatch.setattr(calibration, "calibrate", lambda *given: dict(list(right(*given).items())[1:]))
    with pytest.raises(CheckFailedError, match="13 layers of 14 have moments"):
        calibration.measure(SMALL, rounds=2)
