"""Pull: every hash checked, whole or not at all, and what a cut leaves is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub_server import LoopbackHub
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder
from tests.support.hub_client import Client


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("pull") / "source", llama_like(), shards=3)
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    return folder


def test_a_plain_checkpoint(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.seed("org/plain", folder)
    body = client.result("pull", "org/plain", tmp_path / "out", "--dry-run")
    assert body["bytes"] == sum(body["files"].values())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    body = client.result("pull", "org/plain", tmp_path / "out")
    assert (body["kind"], body["commit"]) == ("dense", hub.repos["org/plain"].refs["main"][-1][0])
    expected = contents(folder)
    del expected["pytorch_model.bin"]
    assert contents(tmp_path / "out") == expected
    done = client("pull", "org/plain", tmp_path / "out")
    assert "expected a new or empty folder, got one with content" in done.stderr
    assert client("pull", "org/plain", tmp_path / "out", "--overwrite").code == 0


def test_only_some_files(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.seed("org/plain", folder)
    body = client.result("pull", "org/plain", tmp_path / "out", "--include", "*.json", "--include", "*.bin")
    assert body["kind"] == "files"
    assert "pytorch_model.bin" in contents(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    done = client("pull", "org/plain", tmp_path / "x", "--include", "no*")
    assert (
        "--include: expected globs of file names, got 'no*', which matches none of 8 files of org/plain" in done.stderr
    )
    done = client("pull", "./org", tmp_path / "x")
    assert "./org: expected org/name or hf://org/name, got a path." in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json"])
def test_wrong_bytes_are_not_published(
    hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path, name: str
) -> None:
    hub.seed("org/wrong", folder)
    hub.fail(f"GET .*/resolve/.*{name}", corrupt=True, times=-1)
    hub.faults[0].skip_ranges = True
    done = client("pull", "org/wrong", tmp_path / "out")
    assert done.code == 1
    assert (
        f"org/wrong: {name} does not have the hash the Hub lists; expected files as they were uploaded" in done.stderr
    )
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hub.log.clear()
    client.result("pull", "org/wrong", tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    whole = [r for r in hub.log if r.line.startswith("GET") and "/resolve/" in r.line and r.status == 200]
    assert len(whole) == 1  # the others were kept


def test_a_cut_download_goes_on(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {f"{i}.weight": gaussian(512, 512, seed=i) for i in range(4)}, shards=4)
    hub.seed("org/cut", source)
    for number in range(1, 4):
        hub.fail(f"GET .*/resolve/.*model-0000{number}", cut_after=500_000, times=-1).skip_ranges = True
    done = client("pull", "org/cut", tmp_path / "out")
    assert done.code == 1
    assert "org/cut: " in done.stderr
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hub.log.clear()
    client.result("pull", "org/cut", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)
    assert hub.sent < 3_500_000  # of 4 MB: one file, and parts of others, were there


def test_unfinished_work_of_others_is_kept(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.seed("org/plain", folder)
    (tmp_path / "out.partial" / "units").mkdir(parents=True)
    done = client("pull", "org/plain", tmp_path / "out")
    assert (
        "out.partial: expected an unfinished pull, got the work of another command. Finish or remove it first."
        in done.stderr
    )
    assert (tmp_path / "out.partial" / "units").exists()
