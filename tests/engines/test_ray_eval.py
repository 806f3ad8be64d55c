"""eval of several models on a cluster of Ray: the table of one machine, whatever is lost on the way."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from spectral_surgery.cli import cli
from spectral_surgery.commands.eval import EvalReport, evaluate
from spectral_surgery.commands.settings import Reference
from spectral_surgery.engines import cluster as engine
from spectral_surgery.text.settings import EvalData
from tests.commands.test_calibrate import save_model, write_text
from tests.engines.nodes import another_node, on
from tests.support.checkpoints import write_folder

ray = pytest.importorskip("ray")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, what is left of it at three rates, and a text."""
    root = tmp_path_factory.mktemp("models")
    save_model("llama", root / "a")
    write_text(root / "text.txt")
    for bits in ("2", "3", "4"):
        done = CliRunner().invoke(cli, ["compress", str(root / "a"), str(root / bits), "--bits", bits, "-q"])
        assert done.exit_code == 0, done.output
    return root


def judged(folder: Path, **more: Any) -> EvalReport:
    data = EvalData(text=folder / "text.txt", seq_length=16, samples=8)
    report = evaluate(folder / "a", folder / "2", data, reference=Reference((folder / "3", folder / "4")), **more)
    return replace(report, seconds=0.0)


def test_the_table_is_that_of_one_machine_when_a_node_is_lost(connected: Any, folder: Path) -> None:
    with another_node(connected) as third:
        lose = threading.Timer(2, connected.remove_node, (third, False))
        lose.start()
        found = judged(folder, run=on(connected))
        lose.join()
    assert found == judged(folder)
    assert [row.model for row in found.models] == ["a", "2", "3", "4"]
    assert not found.failed


def test_one_that_fails_is_named_and_the_others_finish(cluster: Any, folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", {"model.norm.weight": torch.ones(7)})
    models = [str(folder / "a"), str(folder / "3"), str(other), str(folder / "4")]
    done = CliRunner().invoke(
        cli, ["eval", *models, "-q", "--json", "--engine", "ray", "--ray-address", cluster.address]
    )
    assert done.exit_code == 1
    body = json.loads(done.stdout)
    assert [model["model"] for model in body["models"]] == ["a", "3", "4"]
    assert f"Error: {other}: model.norm.weight: expected equal shapes" in done.stderr


def test_a_call_that_nobody_can_take_is_waited_for(connected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    said: list[str] = []
    added: list[Any] = []

    def note(sentence: str) -> None:
        said.append(sentence)
        added.append(connected.add_node(num_cpus=3, memory=4 << 30, object_store_memory=80 << 20))

    found = list(engine.each_on_ray(on(connected, threads=3, note=note), [lambda: 1], 1 << 20))
    connected.remove_node(added[0], allow_graceful=False)
    assert found == [(0, 1)]
    assert len(said) == 1
