"""The FourierFT case refuses figures of a wrong layer, and runs on a small one."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from benchmarks.case import CheckFailedError
from benchmarks.cases import adapters
from benchmarks.peft_control import peft_layer
from spectral_surgery.errors import BackendError

SIDE = 48


def test_a_wrong_layer_is_refused() -> None:
    _, ours = adapters.layers(SIDE)
    x, dy = adapters.signal(3, SIDE, 1), adapters.signal(3, SIDE, 2)
    adapters.check(ours, x, dy)
    ours.set_active({"default": 1.001})
    with pytest.raises(CheckFailedError, match=r"y of \(3, 48\) differs from the definition by .*not shown"):
        adapters.check(ours, x, dy)


def test_rows_of_a_small_case() -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    for trains in (False, True):
        rows = adapters.measure(adapters.Load(SIDE, 3, trains, 3, 1e9))
        assert [row["layer"] for row in rows] == ["base", "ours", "PEFT LoRA r=8", "PEFT FourierFT"]
        assert [row["met"] for row in rows] == ["", True, "", ""]
        assert rows[0]["time / base"] == 1
    if sys.platform == "linux":
        memory = adapters.memory(SIDE, 3)
        assert memory["met"] == (memory["MB"] < adapters.MEMORY / 1e6)
    injection = adapters.injection(SIDE)  # how long it takes is for the bench to say
    assert injection["met"] == (injection["s"] < adapters.INJECTION)
    assert injection["s"] > 0


def test_peft_is_needed_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendError, match=r"peft: not installed; it is needed to compare with. Use pip install peft"):
        peft_layer(nn.Linear(2, 2), "lora")
