"""The examples: each runs on tiny models, and uses public names only."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import spectral_surgery
from spectral_surgery import live
from tests.support.named_models import named_models

ROOT = Path(spectral_surgery.__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.*"))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named_models(tmp_path_factory.mktemp("examples"))


def arguments(example: str) -> list[str]:
    return {
        "compress_checkpoint.py": ["MODEL", "out"],
        "compress_push_load.py": ["MODEL", "out"],
        "train_push_load.py": ["MODEL", "notes.txt", "out"],
        "sts_adapters.py": [
            *("--train", "pairs.csv", "--dev", "pairs.csv"),
            *("--out", "out", "--model", "encoder", "--steps", "2"),
        ],
    }[example]


@pytest.mark.slow
@pytest.mark.timeout(900)  # several trainings
@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.suffix == ".py"], ids=lambda path: path.name)
def test_every_example_runs(
    example: Path,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example.name, *arguments(example.name)])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) >= 2
    assert "bits equal is False" not in printed


def notebook_code(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (notebook,) = (path for path in EXAMPLES if path.suffix == ".ipynb")
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(notebook_code(notebook)):
        exec(compile(cell, f"{notebook.name}, code cell {number}", "exec"), names)
    assert (tmp_path / "first-look" / "first-look.png").read_bytes()[:4] == b"\x89PNG"
    assert names["measures"][4]["kl"] < names["measures"][2]["kl"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_use_public_names_only(example: Path) -> None:
    source = "\n".join(notebook_code(example)) if example.suffix == ".ipynb" else example.read_text(encoding="utf-8")
    assert not list(private_names(source))


def private_names(source: str) -> Iterator[str]:
    public = {"spectral_surgery": set(spectral_surgery.__all__), "spectral_surgery.live": set(live.__all__)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("spectral_surgery"):
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name not in public.get(str(node.module), ()))
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name for name in names if name.startswith("spectral_surgery") and name not in public)


def test_a_private_name_is_found() -> None:
    assert list(private_names("from spectral_surgery.codec.rate import Target"))
    assert list(private_names("from spectral_surgery import nothing"))
    assert list(private_names("import spectral_surgery.codec"))
    assert not list(private_names("from spectral_surgery import Target, live\nimport spectral_surgery"))
