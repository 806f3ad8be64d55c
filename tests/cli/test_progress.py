"""Lines of progress where there is no terminal: a tenth each, with the time that is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from spectral_surgery.cli import output


@pytest.mark.parametrize(
    ("pace", "left"),
    [(1, ["18 s", "16 s"]), (40, ["12 min", "11 min"]), (3000, ["15 h", "13 h"])],
)
def test_lines_tell_the_time_left(
    pace: int, left: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 1000.0
    monkeypatch.setattr(output, "time", SimpleNamespace(perf_counter=lambda: clock))
    with output.progress(quiet=False) as progress:
        for done in range(1, 21):
            progress(done, 20, f"w{done}")
            clock += pace
        clock += 1e6  # the next stage starts anew
        for done in range(1, 5):
            progress(done, 20, f"v{done}")
            clock += pace
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert lines[0] == f" 10% w2, {left[0]} left"
    assert lines[1] == f" 20% w4, {left[1]} left"
    assert lines[9] == "100% w20"
    assert lines[10] == f" 10% v2, {left[0]} left"


def test_one_report_alone_tells_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress(quiet=False) as progress:
        progress(5, 10, "half")
        progress(5, 10, "half again")
    assert capsys.readouterr().err == " 50% half\n"
