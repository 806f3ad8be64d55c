"""Exports of a model are judged against the decoded model, by whoever is installed to run them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="not run: gguf is not installed")
pytest.importorskip("compressed_tensors", reason="not run: compressed-tensors is not installed")

from benchmarks.case import Inputs
from benchmarks.cases import export
from spectral_surgery.errors import ConfigError
from tests.commands.test_export_gguf import MODELS, plain_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def number(row: dict[str, object], name: str) -> float:
    return float(str(row[name]))


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = plain_model(tmp_path / "model", *MODELS["llama"]), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and back again. " * 40)
    monkeypatch.setattr(export, "smollm2_folder", lambda _: source)
    monkeypatch.setattr(export, "LENGTH", 32)
    monkeypatch.setattr(export, "SEQUENCES", 4)
    rows = export.run(Inputs(text=text, scratch=tmp_path / "scratch"))
    names = [row.get("export") or row["skipped"] for row in rows]
    written = [name for name in export.NAMES if name != "gguf Q4_K_M" or export.installed()]
    assert names == ["decoded", *written, *([] if export.installed() else ["llama.cpp"])]
    found = {str(row["export"]): row for row in rows if "export" in row}
    first = number(found["decoded"], "perplexity")
    for name in written:
        row = found[name]
        assert number(row, "perplexity over decoded") == pytest.approx(number(row, "perplexity") / first)
        assert 0 < number(row, "error") < number(row, "total")
        assert number(row, "kl") >= 0
    assert number(found["gguf Q8_0"], "error") < 0.01 < number(found["gguf Q4_0"], "error")
    assert number(found["gguf Q8_0"], "perplexity over decoded") == pytest.approx(1, abs=0.01)
    for name in ("compressed-tensors 4", "gguf Q8_0"):
        assert isinstance(found[name]["met"], bool)
    with pytest.raises(ConfigError, match="--only Q8_0: expected some of compressed-tensors 4"):
        export.run(Inputs(only=("Q8_0",)))
