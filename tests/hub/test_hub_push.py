"""Push: checked first, one commit, nothing sent twice, nothing lost when it is cut off."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.case import CheckFailedError
from tests.hub_server import TOKEN, LoopbackHub
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder
from tests.support.hub_client import Client, running


@pytest.fixture(scope="module")
def compressed(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    source = write_folder(folder / "source", llama_like())
    client.result("compress", source, folder / "out", "--bits", "4")
    return folder / "out"


def adapter(folder: Path, **config: object) -> Path:
    folder.mkdir()
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 8)}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.usefixtures("hub")
def test_round_trip(client: Client, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama_like(), shards=2)
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "model.safetensors").write_bytes((source / "model-00001-of-00002.safetensors").read_bytes())
    body = client.result("compress", source, tmp_path / "out", "--bits", "3", "--push", "me/small")
    assert body["pushed"]["changed"] is True
    client.result("pull", "me/small", tmp_path / "pulled")
    there, here = contents(tmp_path / "pulled"), contents(tmp_path / "out")
    assert there.pop("README.md") == here.pop("README.md").replace(b"THIS_FOLDER", b"me/small")
    assert there == here
    client.result("decompress", "me/small", tmp_path / "plain")
    client.result("decompress", tmp_path / "out", tmp_path / "direct")
    plain, direct = contents(tmp_path / "plain"), contents(tmp_path / "direct")
    assert b"spectral-surgery decompress me/small OUT\n" in plain["README.md"]
    assert plain.pop("README.md").replace(b"me/small", b"COMPRESSED") == direct.pop("README.md")
    assert plain == direct


def test_a_push_is_one_commit_and_the_next_one_none(hub: LoopbackHub, client: Client, compressed: Path) -> None:
    first = client.result("push", compressed, "me/small", "--private", "--message", "Four bits")
    assert (first["kind"], first["changed"], first["deleted"]) == ("compressed", True, [])
    assert hub.repos["me/small"].private
    assert len(hub.repos["me/small"].refs["main"]) == 2
    names = {"README.md", "config.json", "model.safetensors", "spectral_surgery.json", "tokenizer.json"}
    names.add("shim_spectral_surgery.py")  # for those who load it without importing us
    assert set(first["files"]) == names == set(hub.contents("me/small"))
    again = client.result("push", compressed, "me/small")
    assert again["changed"] is False
    assert again["commit"] == first["commit"]
    assert len(hub.repos["me/small"].refs["main"]) == 2
    text = client("push", compressed, "me/small").stdout
    assert "compressed: 6 files" in text
    assert f"Nothing had changed: {hub.endpoint}/me/small/commit/{first['commit']}" in text


def test_pushing_200_mb_again_moves_less_than_a_megabyte(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    size = 200_000_000
    raw = json.dumps({"a.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (tmp_path / "big").mkdir()
    with (tmp_path / "big" / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + size)
    client.result("push", tmp_path / "big", "me/big")
    assert hub.received > size
    hub.reset()
    assert client.result("push", tmp_path / "big", "me/big")["changed"] is False
    assert hub.received + hub.sent < 1_000_000
    (tmp_path / "big" / "notes.txt").write_text("new")  # a small change is a small upload
    assert client.result("push", tmp_path / "big", "me/big")["changed"] is True
    assert hub.received + hub.sent < 1_000_000


def shards(folder: Path, count: int = 6) -> Path:
    return write_folder(folder, {f"{i}.weight": gaussian(256, 256, seed=i) for i in range(count)}, shards=count)


def test_an_upload_cut_at_random_bytes_goes_on(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = shards(tmp_path / "folder")
    chance = random.Random(0)
    for attempt in range(10):
        cut = hub.fail("PUT /lfs/", cut_after=chance.randrange(1, 262_000), times=-1)
        if attempt % 2:  # now and then a file gets through before the next is cut
            hub.faults.insert(0, hub.fail("PUT /lfs/", times=1))
        done = client("push", folder, "me/cut")
        assert done.code == 1
        assert "Error: me/cut: cannot be reached or used (" in done.stderr
        assert set(hub.contents("me/cut")) == set()
        assert cut.times < -1
        hub.faults.clear()
    client.result("push", folder, "me/cut")
    there, here = hub.contents("me/cut"), contents(folder)
    there.pop("README.md")
    assert there == here
    assert len(hub.repos["me/cut"].refs["main"]) == 2  # the first commit of a new repository, and ours
    large = sorted(hashlib.sha256(data).hexdigest() for name, data in here.items() if name.endswith(".safetensors"))
    assert sorted(hub.stored) == large  # each was kept once, over all attempts


def test_a_killed_push_goes_on(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = shards(tmp_path / "folder")
    with running(tmp_path / "killed", hub.endpoint, HF_TOKEN=TOKEN) as victim:
        hub.fail("PUT /lfs/", times=2)  # let two files through
        hub.fail("PUT /lfs/", cut_after=1000, on_hit=lambda: os.kill(victim.pid, signal.SIGKILL))
        with pytest.raises(CheckFailedError, match="the client died"):
            victim("push", folder, "me/killed")
    assert hub.contents("me/killed") == {}
    client.result("push", folder, "me/killed")
    there = hub.contents("me/killed")
    there.pop("README.md")
    assert there == contents(folder)
    assert len(hub.stored) == len(set(hub.stored)) == 6


def test_branches_and_pull_requests(hub: LoopbackHub, client: Client, compressed: Path) -> None:
    client.result("push", compressed, "me/small", "--revision", "dev")
    assert hub.contents("me/small") == {}
    assert "model.safetensors" in hub.contents("me/small", "dev")
    body = client.result("push", compressed, "me/small", "--create-pr")
    assert body["url"] == f"{hub.endpoint}/me/small/discussions/1"
    assert "model.safetensors" in hub.contents("me/small", "refs/pr/1")
    done = client("push", compressed, "me/small", "--create-pr", "--revision", "dev")
    assert done.code == 1
    assert (
        "--create-pr: expected no --revision with it, got one: a pull request is to the default branch." in done.stderr
    )


def test_files_of_the_checkpoint_before_are_replaced(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    client.result("push", shards(tmp_path / "six"), "me/m")
    hub.edit("me/m", "notes.md", b"mine")
    hub.edit("me/m", "onnx/model.onnx", b"mine too")
    body = client.result("push", shards(tmp_path / "one", 1), "me/m")
    assert len(body["deleted"]) == 7
    assert "removed, replaced by the new files" not in client("push", tmp_path / "one", "me/m").stdout
    there = hub.contents("me/m")
    names = {"README.md", "config.json", "model.safetensors", "notes.md", "onnx/model.onnx", "tokenizer.json"}
    assert set(there) == names
    client.result("push", adapter(tmp_path / "adapter"), "me/m")  # an adapter beside a model replaces nothing
    assert "model.safetensors" in hub.contents("me/m")


def test_a_dry_run_asks_nothing_of_the_hub(hub: LoopbackHub, client: Client, compressed: Path) -> None:
    before = contents(compressed)
    body = client.result("push", compressed, "me/small", "--dry-run")
    assert (body["dry_run"], body["commit"], body["kind"]) == (True, "", "compressed")
    assert "Nothing was uploaded." in client("push", compressed, "me/small", "--dry-run").stdout
    assert not hub.log
    assert contents(compressed) == before


def test_hidden_files_stay_here(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = shards(tmp_path / "folder", 1)
    for name in (".env", ".git/config", "sub/.netrc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("password")
    client.result("push", folder, "me/hidden")
    assert b"password" not in b"".join(hub.contents("me/hidden").values())


def test_adapters(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    assert client.result("push", folder, "me/adapter")["kind"] == "adapter"
    assert not (folder / "README.md").exists()
    card = hub.contents("me/adapter")["README.md"].decode()
    for line in ("base_model: org/base", "base_model_relation: adapter", "library_name: peft", "- lora", "r 2"):
        assert line in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "me/adapter")' in card
    client.result("pull", "me/adapter", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("flip", "with its checksum, got another one"),
        ("manifest", "got a compressed one (config.json says so) without spectral_surgery.json"),
        ("weights", "expected a folder with .safetensors files, got no weights"),
        ("card", "README.md: expected metadata in YAML"),
        ("encoding", "README.md: expected UTF-8 text, got other bytes ("),
        ("token", "notes.txt: holds your access token; expected files without it. Remove it, and renew it."),
        ("folder", "expected a folder with a checkpoint or an adapter, got no such folder"),
        ("adapter type", "adapter_config.json: expected the name of a method as peft_type, got 3"),
        ("adapter file", "got none: adapter_model.safetensors is missing"),
        ("adapter nan", "got NaN or infinite values in base_model.model.q.lora_A.weight"),
    ],
)
def test_a_damaged_folder_is_refused_before_the_hub_is_asked(
    hub: LoopbackHub, client: Client, compressed: Path, tmp_path: Path, change: str, text: str
) -> None:
    folder = tmp_path / "folder"
    if change.startswith("adapter"):
        adapter(folder, **({"peft_type": 3} if change.endswith("type") else {}))
    else:
        folder.mkdir()
        for path in compressed.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    damage(folder, change)
    done = client("push", folder, "me/x")
    assert done.code == 1
    assert text in done.stderr
    assert TOKEN not in done.stderr
    assert not hub.log


def damage(folder: Path, change: str) -> None:
    written = {
        "card": ("README.md", b"---\na: [\n---\n"),
        "encoding": ("README.md", b"\xff\xff"),
        "token": ("notes.txt", f"use {TOKEN}".encode()),
    }
    removed = {
        "manifest": "spectral_surgery.json",
        "weights": "model.safetensors",
        "adapter file": "adapter_model.safetensors",
    }
    if change in written:
        (folder / written[change][0]).write_bytes(written[change][1])
    elif change in removed:
        (folder / removed[change]).unlink()
    elif change == "folder":
        folder.rename(folder.with_name("elsewhere"))
    elif change == "flip":
        weights = folder / "model.safetensors"
        data = bytearray(weights.read_bytes())
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        codes = next(entry for name, entry in header.items() if name.endswith(".spectral_codes"))
        data[8 + size + codes["data_offsets"][0] + 40] ^= 1
        weights.write_bytes(data)
    elif change == "adapter nan":
        bad = {"base_model.model.q.lora_A.weight": torch.full((2, 8), float("nan"))}
        save_file(bad, folder / "adapter_model.safetensors")


def test_a_card_edited_on_the_hub_is_kept(hub: LoopbackHub, client: Client, compressed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in compressed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    client.result("push", folder, "me/card")
    card = hub.contents("me/card")["README.md"].decode()
    edited = card.replace("license", "licence") + "\n## Mine\n\nDo not touch.\n"
    hub.edit("me/card", "README.md", edited.encode())
    (folder / "more.txt").write_text("x")
    client.result("push", folder, "me/card")
    there = hub.contents("me/card")
    assert there["README.md"].decode() == edited
    assert "more.txt" in there
    (folder / "README.md").write_text(card + "\n## Also mine\n")
    done = client("push", folder, "me/card")
    assert done.code == 1
    assert "got edits of README.md on the Hub and in folder. Merge both" in done.stderr
    (folder / "README.md").unlink()  # as the message says
    client.result("push", folder, "me/card")
    assert hub.contents("me/card")["README.md"].decode() == edited
    hub.edit("me/card", "README.md", b"# All mine, no metadata\r\n\r\nEnd\r\n")
    client.result("push", folder, "me/card")
    last = hub.contents("me/card")["README.md"].decode()
    assert last.endswith("# All mine, no metadata\r\n\r\nEnd\r\n")
    assert last.startswith("---\r\n")
    assert "spectral-surgery:begin edited" in last
