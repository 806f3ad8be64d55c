"""Sources on the Hub: what a name means, headers by range, only the files that are needed, the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectral_surgery.errors import HubError
from spectral_surgery.hub import Repository, remote, to_push
from tests.hub_server import LoopbackHub
from tests.support.checkpoints import contents, llama_like, write_folder
from tests.support.gguf_files import write_gguf
from tests.support.hub_client import Client, running

CARD = "---\nlicense: mit\nlanguage: en\n---\n# Base\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint among files that no command needs."""
    folder = write_folder(tmp_path_factory.mktemp("source") / "base", llama_like(), shards=2)
    (folder / "README.md").write_text(CARD)
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100_000)
    (folder / "consolidated.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x" * 100_000)
    return folder


def without_card(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name != "README.md"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", Repository("org/name")),
        ("org/name@v1.0", Repository("org/name", "v1.0")),
        ("org/name@refs/pr/3", Repository("org/name", "refs/pr/3")),
        ("hf://org/name", Repository("org/name")),
        ("hf://models/org/name@dev/", Repository("org/name", "dev")),
        ("hf://org/name@refs/pr/3/unet", Repository("org/name", "refs/pr/3", "unet")),
        ("hf://org/name/a/b.safetensors", Repository("org/name", None, "a/b.safetensors")),
        ("./org/name", None),
        ("/org/name", None),
        ("~/name", None),
        ("name", None),
        ("a/b/c", None),
        ("tests/hub", None),
    ],
)
def test_what_a_source_means(source: str, expected: Repository | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert remote(source) == expected
    if expected is not None:
        overridden = remote(source, "main")
        assert overridden is not None
        assert overridden.revision == "main"
        assert remote(f"hf://{str(expected).removeprefix('hf://')}") == expected or "pr/3" in source


@pytest.mark.parametrize("source", ["hf://datasets/org/name", "hf://name", "hf://org/name/../../etc", "hf://org/a b"])
def test_other_uris_are_refused(source: str) -> None:
    with pytest.raises(HubError, match=r"is not a model on the Hub; expected hf://org/name\[@revision\]\[/path\]"):
        remote(source)


@pytest.mark.parametrize("name", ["name", "a/b/c", "../b", "org/name@dev", "/a/b", "org/"])
def test_only_repositories_can_be_pushed_to(name: str) -> None:
    with pytest.raises(HubError, match=r"cannot be pushed to; expected org/name. A branch is given by --revision"):
        to_push(name)


def test_inspect_reads_headers_and_no_weights(hub: LoopbackHub, client: Client, folder: Path) -> None:
    hub.seed("org/base", folder)
    body = client.result("inspect", "org/base")
    assert body["kind"] == "dense"
    local = client.result("inspect", folder)
    assert [row["name"] for row in body["tensors"]] == [row["name"] for row in local["tensors"]]
    assert body["nbytes"] == local["nbytes"]
    assert "pytorch_model.bin" in body["skipped_files"]
    assert body["tied"] == {}  # that takes reading the weights
    weights = [r for r in hub.log if r.line.startswith("GET") and ".safetensors " in f"{r.line} "]
    assert {r.status for r in weights} == {206}
    assert not any("consolidated" in r.line or ".bin" in r.line or "README" in r.line for r in hub.log)


def test_inspect_of_a_gigabyte_moves_less_than_a_megabyte(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    side, layers = 4096, 30
    header: dict[str, object] = {
        f"model.layers.{i}.mlp.{n}_proj.weight": {
            "dtype": "BF16",
            "shape": [side, side],
            "data_offsets": [k * 2 * side * side, (k + 1) * 2 * side * side],
        }
        for k, (i, n) in enumerate((i, "up") for i in range(layers))
    }
    header["__metadata__"] = {"format": "pt", "note": "x" * 200_000}  # a header longer than one request
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + layers * 2 * side * side)
    hub.seed("org/big", folder)
    body = client.result("inspect", "org/big")
    assert body["nbytes"] > 1e9
    assert hub.sent + hub.received < 1e6
    plan = client.result("compress", "org/big", tmp_path / "out", "--bits", "4", "--dry-run")
    assert plan["weights"] == layers * side * side
    assert hub.sent + hub.received < 1e6


def test_a_compressed_repository_is_inspected_from_its_manifest(
    hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path
) -> None:
    client.result("compress", folder, tmp_path / "out", "--bits", "4")
    hub.seed("org/small", tmp_path / "out")
    assert client.result("inspect", "org/small") == client.result("inspect", tmp_path / "out")
    assert client.result("decompress", "hf://org/small", tmp_path / "x", "--dry-run")["compressed_tensors"] == 3
    assert not (tmp_path / "x").exists()


def test_compress_fetches_only_what_it_needs(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.seed("org/lean", folder)
    client.result("compress", "org/lean", tmp_path / "a", "--bits", "4", "--keep-source")
    client.result("compress", folder, tmp_path / "b", "--bits", "4")
    fetched = {r.line.rpartition("/")[2] for r in hub.log if r.line.startswith("GET") and r.status == 200}
    assert {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors"} <= fetched
    assert not {"pytorch_model.bin", "model.onnx", "consolidated.safetensors"} & fetched
    for name in ("model.safetensors", "spectral_surgery.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "base_model: org/lean\n" in card
    assert "license: mit\n" in card
    assert "spectral-surgery compress org/lean OUT --bits 4\n" in card


def test_revisions_folders_and_files(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    write_folder(nested / "unet", {"a.weight": torch.ones(70, 70)})
    save_file({"b.weight": torch.ones(3, 5)}, nested / "extra.safetensors")
    repo = hub.seed("org/nested", nested)
    repo.refs["old"] = repo.refs["main"][:1]
    assert [t["name"] for t in client.result("inspect", "hf://org/nested/unet")["tensors"]] == ["a.weight"]
    assert [t["name"] for t in client.result("inspect", "hf://org/nested/extra.safetensors")["tensors"]] == ["b.weight"]
    assert client.result("inspect", "hf://org/nested/unet", "--spectrum")["spectra"][0]["name"] == "a.weight"
    sha = repo.refs["main"][-1][0]
    assert client.result("inspect", f"org/nested@{sha}")["nbytes"] == 60
    body = client.result("pull", "hf://org/nested/unet", tmp_path / "pulled")
    assert sorted(body["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "pulled" / "model.safetensors").exists()
    done = client("inspect", "org/nested", "--revision", "old")
    assert "org/nested@old: expected a folder with .safetensors files, got no weights" in done.stderr
    done = client("inspect", "hf://org/nested/vae")
    assert "has no such file or folder; expected files it lists. Check the path." in done.stderr


def test_a_pickle_is_refused_before_anything_is_fetched(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"x" * 10_000)
    (tmp_path / "p" / "config.json").write_text('{"architectures": ["BertModel"]}')
    hub.seed("org/pickled", tmp_path / "p")
    done = client("compress", "org/pickled", tmp_path / "out", "--bits", "4")
    assert done.code == 1
    assert "org/pickled: expected safetensors, got pickled weights ('pytorch_model.bin')" in done.stderr
    assert "/tmp" not in done.stderr
    assert hub.sent < 5000


@pytest.mark.parametrize("shards", [False, True])
def test_pickles_are_fetched_where_that_is_allowed(
    shards: bool, hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path
) -> None:
    source, tensors = tmp_path / "p", llama_like()
    source.mkdir()
    if shards:
        weight_map = {name: f"pytorch_model-{n % 2}.bin" for n, name in enumerate(tensors)}
        for file in {*weight_map.values()}:
            torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, source / file)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, source / "pytorch_model.bin")
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "tokenizer.json").write_text("{}")
    hub.seed("org/pickles", source)
    options = ("--bits", "4", "--allow-bin", "--min-weights", "64")
    client.result("compress", "org/pickles", tmp_path / "far", *options, *(["--keep-source"] if shards else []))
    client.result("compress", source, tmp_path / "near", *options)
    assert without_card(tmp_path / "far") == without_card(tmp_path / "near")
    lone = client("inspect", f"hf://org/pickles/pytorch_model{'-0' if shards else ''}.bin", "--allow-bin")
    assert lone.code == 0, lone.stderr
    hub.seed("org/plain", folder)
    client.result("compress", "org/plain", tmp_path / "plain", "--bits", "4", "--allow-bin")


def test_a_gguf_file_is_fetched(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = tmp_path / "g"
    source.mkdir()
    write_gguf(source / "model-Q8_0.gguf", "llama")
    write_gguf(source / "model-F16.gguf", "llama", "F16")
    hub.seed("org/gguf", source)
    refused = client("compress", "org/gguf", tmp_path / "out", "--bits", "5")
    assert "Give one of its GGUF files by itself: 'model-F16.gguf', 'model-Q8_0.gguf'." in refused.stderr
    assert hub.sent < 5000
    options = ("--bits", "5", "--min-weights", "512")
    done = client("compress", "hf://org/gguf/model-Q8_0.gguf", tmp_path / "far", *options)
    assert done.code == 0, done.stderr
    assert "note: The result has no tokenizer: transformers cannot make one" in done.stdout + done.stderr
    client.result("compress", source / "model-Q8_0.gguf", tmp_path / "near", *options)
    assert without_card(tmp_path / "far") == without_card(tmp_path / "near")
    missing = client("compress", "hf://org/gguf/other.gguf", tmp_path / "none", *options)
    assert "has no such file or folder; expected files it lists. Check the path." in missing.stderr


def test_a_damaged_remote_header_is_refused(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    data = bytearray((folder / "model-00001-of-00002.safetensors").read_bytes())
    for name, header in (("short", data[:200]), ("huge", b"\xff" * 8 + data[8:]), ("empty", b"")):
        (tmp_path / "d" / "model.safetensors").write_bytes(bytes(header))
        hub.seed(f"org/{name}", tmp_path / "d")
        done = client("inspect", f"org/{name}")
        assert done.code == 1
        assert done.stderr.startswith(f"Error: org/{name}/model.safetensors: ")


def test_paths_that_lead_out_are_refused(hub: LoopbackHub, client: Client, folder: Path) -> None:
    repo = hub.seed("org/evil", folder)
    files = repo.refs["main"][-1][1]
    files["../../evil.json"] = files["config.json"]
    done = client("inspect", "org/evil")
    assert "expected paths inside it, got '../../evil.json'. Do not trust this Hub." in done.stderr


def test_a_server_without_ranges_is_not_read_to_the_end(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    big = tmp_path / "one"
    big.mkdir()
    save_file({"a.weight": torch.zeros(2000, 2000)}, big / "model.safetensors")
    hub.seed("org/one", big)
    hub.ranges = False
    try:
        assert client.result("inspect", "org/one")["nbytes"] == 16_000_000
    finally:
        hub.ranges = True
    assert hub.sent < 8_000_000  # what was under way when the client had enough


def test_the_cache_serves_when_offline_or_unreachable(
    hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path
) -> None:
    hub.seed("org/cached", folder)
    hub.seed("org/other", folder)
    expected = client.result("inspect", "org/cached", "--spectrum", "--keep-source")
    hub.reset()
    with running(tmp_path, hub.endpoint, HF_HOME=str(client.home), HF_HUB_OFFLINE="1") as offline:
        assert offline.result("inspect", "org/cached", "--spectrum") == expected
        assert offline.result("inspect", "org/cached")["tied"]  # the weights are there
        done = offline("inspect", "org/other")
        assert done.code == 1
        assert "org/other: is not in the cache, and HF_HUB_OFFLINE forbids to fetch it" in done.stderr
        assert done.stderr.count("\n") == 1
        for arguments in (("push", folder, "me/x", "--quiet"), ("pull", "org/cached", tmp_path / "x")):
            done = offline(*arguments)
            assert done.code == 1
            assert f"{arguments[1] if arguments[0] == 'pull' else 'me/x'}: is not asked, since HF_HUB" in done.stderr
    assert not hub.log
    hub.fail(" ", cut_after=0, times=-1)  # no answer to anything
    assert client.result("inspect", "org/cached", "--spectrum") == expected
    for arguments in (("inspect", "org/other"), ("push", folder, "me/x"), ("pull", "org/cached", tmp_path / "x")):
        done = client(*arguments)
        assert done.code == 1
        assert ": cannot be reached or used (" in done.stderr
        assert "Check the name, the network and HF_ENDPOINT." in done.stderr
