"""Weight files go to the Hub as they are finished: neither source nor result is ever here as a whole."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.hub_server import LoopbackHub
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder
from tests.support.hub_client import Client

INDEX = "model.safetensors.index.json"
SIZE = 150_000  # bytes of a weight file; a tensor takes a third


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": gaussian(256, 400, seed=i) for i in range(9)}
    tensors |= llama_like() | {"model.norm.weight": torch.ones(700)}
    folder = write_folder(tmp_path_factory.mktemp("streamed") / "source", tensors, shards=2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    return folder


@pytest.fixture(scope="module")
def expected(client: Client, folder: Path) -> Path:
    """What the same makes here, decompressed again."""
    client.result("compress", folder, folder.parent / "out", "--bits", "4")
    client.result("decompress", folder.parent / "out", folder.parent / "plain")
    return folder.parent / "plain"


def check(hub: LoopbackHub, client: Client, expected: Path, tmp_path: Path) -> None:
    """What the repository holds is whole, and decompresses to the same bits."""
    assert len(hub.repos["me/x"].refs["main"]) == 2  # the one it was made with, and ours
    client.result("pull", "me/x", tmp_path / "pulled")
    client.result("decompress", tmp_path / "pulled", tmp_path / "plain")
    here, there = contents(expected), contents(tmp_path / "plain")
    assert {**there, "README.md": b""} == {**here, "README.md": b""}
    files = hub.contents("me/x")
    assert sum(name.endswith(".safetensors") for name in files) >= 4
    assert b"license: mit" in files["README.md"]
    assert b"spectral-surgery compress " in files["README.md"]
    assert len(set(hub.stored)) == len(hub.stored)


def size_of(folder: Path) -> int:
    """Bytes of parts and of weight files that are there; what goes meanwhile does not count."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.suffix in (".safetensors", ".unit") else 0
    return total


def order(source: object, out: Path, *more: object) -> list[object]:
    return ["compress", source, out, "--bits", "4", "--push", "me/x", "--stream-push", SIZE, *more]


@pytest.mark.parametrize("far", [False, True])
def test_result_is_whole_on_the_hub_and_never_here(
    hub: LoopbackHub, client: Client, folder: Path, expected: Path, tmp_path: Path, far: bool
) -> None:
    hub.seed("org/streamed", folder)
    most, stop = [0], threading.Event()

    def size(path: Path) -> int:
        with suppress(FileNotFoundError):  # files go while they are looked at
            return path.stat().st_size
        return 0

    def look() -> None:
        while not stop.wait(0.005):
            with suppress(FileNotFoundError):
                files = list((tmp_path / "out.partial").rglob("*"))
                most.append(sum(size(path) for path in files if path.suffix in (".safetensors", ".unit")))

    thread = threading.Thread(target=look)
    thread.start()
    body = client.result(*order("org/streamed" if far else folder, tmp_path / "out"))
    stop.set()
    thread.join()
    assert 0 < max(most) < 4.5 * SIZE
    assert sum(len(data) for name, data in hub.contents("me/x").items() if name.endswith(".safetensors")) > 3 * SIZE
    names = set(contents(tmp_path / "out"))
    assert names >= {
        "config.json",
        "spectral_surgery.json",
        "README.md",
        INDEX,
        "tokenizer.json",
    }
    assert not any(name.endswith((".safetensors", ".unit", "lock", ".version")) for name in names)
    assert not (tmp_path / "out.partial").exists()
    assert body["pushed"]["changed"]
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert set(weight_map.values()) == {name for name in hub.contents("me/x") if name.endswith(".safetensors")}
    check(hub, client, expected, tmp_path)


@pytest.mark.parametrize("failing", ["PUT /lfs/", "/commit/", "/objects/batch"])
def test_a_failure_publishes_nothing_and_resume_goes_on(
    hub: LoopbackHub, client: Client, folder: Path, expected: Path, tmp_path: Path, failing: str
) -> None:
    hub.fail(failing, times=0 if failing == "/commit/" else 2)  # the first files are taken
    hub.fail(failing, 403, times=-1)
    done = client(*order(folder, tmp_path / "out", "--quiet"))
    assert done.code == 1
    assert done.stderr.startswith("Error: me/x: ")
    assert done.stderr.count("\n") == 1
    assert hub.contents("me/x") == {}
    assert not (tmp_path / "out").exists()
    records = sorted((tmp_path / "out.partial" / "units").glob("*.written"))
    assert records
    stored = list(hub.stored)
    hub.faults.clear()
    done = client(*order(folder, tmp_path / "out", "--quiet"))
    assert "Use --resume to go on with it" in done.stderr
    client.result(*order(folder, tmp_path / "out", "--resume"))
    assert hub.stored[: len(stored)] == stored  # nothing was sent again
    check(hub, client, expected, tmp_path)


def test_options_that_do_not_go_with_it(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    done = client("compress", folder, tmp_path / "out", "--bits", "4", "--stream-push", "1MB")
    assert "--stream-push: expected with --push, got it alone" in done.stderr
    done = client(*order(folder, tmp_path / "out", "--shard", "0/2"))
    assert "--stream-push: expected no --calibrate, --heal or --shard" in done.stderr
    assert not hub.repos


def test_huggingface_hub_has_what_a_stored_file_is_committed_by() -> None:
    """It has no public way to commit a large file without its content, as a run that goes on has to."""
    from huggingface_hub import CommitOperationAdd

    names = {"upload_info", "_upload_mode", "_is_uploaded", "_should_ignore"}
    lacking = names - {field.name for field in fields(CommitOperationAdd)}
    assert not lacking, f"huggingface_hub has renamed {lacking}: hub/upload.py has to be changed with it"
