"""Models of what is no text are trained, compressed and judged on data that they have not seen."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from benchmarks.case import CheckFailedError
from benchmarks.cases import beyond_text
from spectral_surgery import CompressOptions, Target

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("subject", beyond_text.SUBJECTS, ids=lambda subject: subject.name)
def test_rows(subject: beyond_text.Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SECONDS": {True: 0.5}, "HEALING": {True: 4}, "EXAMPLES": 48, "HELD_OUT": 8}.items():
        monkeypatch.setattr(beyond_text, name, value)
    first, *others = beyond_text._rows(subject, tmp_path / "a", True)
    assert [first["way"], *(row["way"] for row in others)] == (
        ["data-free", "calibrated"] + (["calibrated, healed"] if subject.heals else [])
    )
    assert (first["/ data-free"], first["met"]) == (1.0, "")
    for row in others:
        ratio = float(str(row["output error"])) / float(str(first["output error"]))
        assert float(str(row["/ data-free"])) == pytest.approx(ratio)
        assert row["met"] == (ratio <= subject.aim)
    monkeypatch.setattr(beyond_text, "CompressOptions", lambda _: CompressOptions(Target("bits", 5.0)))
    with pytest.raises(CheckFailedError, match="bits a weight"):
        beyond_text._rows(subject, tmp_path / "b", True)
