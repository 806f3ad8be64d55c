"""What `make gpu` writes and prints, with stand-ins for the tests and cases that need a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import on_gpu
from benchmarks.case import Inputs
from benchmarks.cases import CASES
from spectral_surgery.errors import CheckpointError, ConfigError

_BENCH = """
import json, sys
name = sys.argv[1]
if name == "gpu_streaming":
    sys.exit("out of memory")
print(json.dumps({"results": [{"case": name, "status": "ok", "rows": [{"layer": "int8", "ms": 0.01234}]}]}))
"""


def test_cases_are_cases() -> None:
    assert set(on_gpu.CASES) <= set(CASES)


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="gpu: expected a CUDA device, got none"):
        CliRunner().invoke(on_gpu.command, [str(tmp_path / "gpu.json")], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
    for name in on_gpu.CASES:
        assert CASES[name].run(Inputs(quick=True))[0]["skipped"] == "no CUDA device"


def test_what_failed_stands_beside_what_did_not() -> None:
    found = on_gpu.measured([sys.executable, "-c", "print('...'); print('7 passed')"], [sys.executable, "-c", _BENCH])
    assert found["tests"] == "7 passed"
    assert [result["status"] for result in found["results"]] == ["ok", "FAILED"]
    text = on_gpu.as_markdown(json.loads(json.dumps(found)))
    assert "| layer | ms |\n| --- | --- |\n| int8 | 0.0123 |" in text
    assert "gpu_streaming: FAILED: out of memory" in text
    assert f"torch {torch.__version__}" in text
    assert "Tests: 7 passed." in text


def test_a_case_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "_CASE_SECONDS", 0.2)
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    found = on_gpu.measured([sys.executable, "-c", "print('1 passed')"], slow)
    assert [result["reason"] for result in found["results"]] == ["stopped after 0.2 s"] * len(on_gpu.CASES)


def test_tables_of_a_file_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    stamp = {"gpu": "a GPU", "date": "2026-11-30"}
    file.write_text(json.dumps({"stamp": stamp, "tests": "3 passed", "results": []}), encoding="utf-8")
    shown = CliRunner().invoke(on_gpu.command, [str(file), "--tables"], catch_exceptions=False)
    assert shown.output == "gpu a GPU, date 2026-11-30. Tests: 3 passed.\n"
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"gpu.json: expected results of `make gpu`, got something else"):
        CliRunner().invoke(on_gpu.command, [str(file), "--tables"], catch_exceptions=False)
