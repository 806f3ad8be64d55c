"""The length benchmark: checks before it times, leaves out what takes too long, and draws what it found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from benchmarks import cases as bench
from benchmarks import peak
from benchmarks.__main__ import command
from benchmarks.case import CheckFailedError
from benchmarks.cases import mixers as case
from spectral_surgery import memory
from spectral_surgery.mixers import MIXERS
from spectral_surgery.registry import Table

CHOSEN = ("fnet", "causal_hybrid")
ATTENTIONS = ("SDPA", "SDPA with projections", "SDPA in the same block")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "MIXERS", Table("mixer", [MIXERS[name] for name in CHOSEN]))
    monkeypatch.setattr(case, "QUICK_LENGTHS", (16, 64, 256, 1024))
    monkeypatch.setattr(case, "NEAR", 64)
    monkeypatch.setattr(case, "FAR", 256)
    monkeypatch.setattr(case, "LENGTHS", (16, 64, 256, 1024))
    monkeypatch.setattr(case, "QUICK_WIDTH", 8)
    monkeypatch.setattr(case, "ROUNDS", 2)


@pytest.mark.usefixtures("small")
def test_rows() -> None:
    rows = case.run(quick=True)
    times = [row for row in rows if "ms at 16" in row]
    attentions = [(name, causal) for causal in (False, True) for name in ATTENTIONS]
    named = [(row["mixer"], row["causal"]) for row in times[:8]]
    assert named == [("fnet", False), ("causal_hybrid", True), *attentions]
    assert {row["pass"] for row in times} == {case.FORWARD, case.BOTH}
    assert all(float(str(row[f"ms at {length}"])) > 0 for row in times for length in (16, 64, 256, 1024))
    for row in times:
        exponent = float(str(row["exponent"]))
        assert 4**exponent == pytest.approx(row["ms at 256"] / row["ms at 64"])
        assert row["met"] == ("" if row["mixer"] in ATTENTIONS else exponent <= 1.15)
    ratios = [row for row in rows if "times faster at 16" in row]
    beside = [("fnet", "SDPA"), ("causal_hybrid", "SDPA"), ("causal_hybrid", "SDPA with projections")]
    assert [(row["mixer"], row["beside"]) for row in ratios] == beside * 2
    for row, own, other in ((ratios[0], 0, 2), (ratios[1], 1, 5), (ratios[2], 1, 6)):
        assert row["times faster at 64"] == pytest.approx(times[other]["ms at 64"] / times[own]["ms at 64"])
    assert ratios[0]["met"] == (float(str(ratios[0]["times faster at 1024"])) > 1)
    assert ratios[1]["met"] == ""
    assert ratios[2]["met"] == (float(str(ratios[2]["times faster at 1024"])) > 1)
    assert sum("MB at 16" in row for row in rows) == len(times)


@pytest.mark.usefixtures("small")
def test_what_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "BUDGET", 0.0)
    row = case.run(quick=True)[0]
    assert float(str(row["ms at 16"])) > 0
    assert (row["ms at 64"], row["exponent"], row["met"]) == ("", "", "")


class Ahead(nn.Module):
    """Calls itself causal, and is not."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: object = None) -> Tensor:
        return x.flip(1) if cache is None and mask is None else x

    def new_cache(self, *_: object) -> object:
        return object()


def test_wrong_mixers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(MIXERS[name], build=lambda *_: Ahead()) for name in CHOSEN]
    monkeypatch.setattr(case, "MIXERS", Table("mixer", rows))
    with pytest.raises(CheckFailedError, match="fnet: padding changes a sequence"):
        case.check("fnet")
    with pytest.raises(CheckFailedError, match="causal_hybrid: decoding differs from the whole"):
        case.check("causal_hybrid")
    with pytest.raises(CheckFailedError, match="fnet: padding"):
        case.run(quick=True)


@pytest.mark.usefixtures("small")
def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "CASES", Table("bench case", [bench.CASES["mixers"], bench.CASES["rate"]]))
    monkeypatch.setattr("benchmarks.runner.CASES", bench.CASES)
    monkeypatch.setattr("benchmarks.__main__.CASES", bench.CASES)
    file = tmp_path / "lengths.png"
    done = CliRunner().invoke(command, ["mixers", "--quick", "--quiet", "--plot", str(file)])
    assert done.exit_code == 0, done.output
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "times faster at 1024" in done.output


def test_nothing_to_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick = replace(bench.CASES["rate"], run=lambda _: [{"speed": 1}])
    monkeypatch.setattr(bench, "CASES", Table("bench case", [bench.CASES["mixers"], quick]))
    monkeypatch.setattr("benchmarks.runner.CASES", bench.CASES)
    monkeypatch.setattr("benchmarks.__main__.CASES", bench.CASES)
    done = CliRunner().invoke(command, ["rate", "--plot", str(tmp_path / "x.png")])
    assert done.exit_code != 0
    assert "--plot: nothing to draw; mixers is accepted" in done.output + str(done.exception)


def test_peak_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    call = lambda: torch.ones(1 << 22).mul(2).sum()  # noqa: E731 - on one line
    if memory._RESET.exists():
        call()
        assert peak.peak_bytes(call, cpu) == pytest.approx(2 * 4 * (1 << 22), rel=0.2)
    monkeypatch.setattr(memory, "_RESET", tmp_path / "nowhere")
    assert peak.peak_bytes(call, cpu) is None
