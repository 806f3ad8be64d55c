"""What counts as a model: no adapter, no quantised checkpoint; and files keep the names that tools look for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from spectral_surgery.cli import cli
from spectral_surgery.commands.inspect import inspect
from spectral_surgery.errors import CheckpointError, SpectralSurgeryError
from spectral_surgery.files.index import INDEX_FILE, read_index
from spectral_surgery.files.writer import tensor_entry, weights_metadata, weights_name, write_checkpoint
from tests.support.checkpoints import gaussian, llama_like, write_folder

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "target_modules": ["q_proj"]}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): gaussian(2, 96), name.format("B"): gaussian(130, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base", llama_like())


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "ADAPTER", "OUT", "--bits", "4"),
        ("compress", "BASE", "OUT", "--bits", "4", "--base", "ADAPTER"),
        ("inject", "ADAPTER", "OUT", "--method", "lora"),
        ("merge", "ADAPTER", "ADAPTER", "OUT"),
        ("extract", "ADAPTER", "BASE", "OUT", "--method", "lora", "--rank", "2"),
        ("extract", "BASE", "ADAPTER", "OUT", "--method", "lora", "--rank", "2"),
        ("eval", "ADAPTER", "BASE"),
        ("eval", "BASE", "ADAPTER"),
        ("swap", "ADAPTER", "OUT", "--mixer", "fnet", "--layers", "0"),
        ("export", "ADAPTER", "OUT", "--to", "delta", "--base", "ADAPTER"),
        ("train", "ADAPTER", "OUT", "--data", "ADAPTER", "--method", "lora"),
    ],
    ids=" ".join,
)
def test_an_adapter_is_refused_where_a_model_is_asked_for(
    adapter: Path, base: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    paths = {"ADAPTER": adapter, "BASE": base, "OUT": tmp_path / "out"}
    error = invoke(*(paths.get(word, word) for word in arguments)).exception
    assert isinstance(error, SpectralSurgeryError)
    assert str(error) == (
        f"{adapter}: expected a model, got an adapter ('LORA') for 'org/base'. Give that model, or merge the adapter"
        " into it first."
    )
    assert not (tmp_path / "out").exists()


def test_a_model_with_an_adapter_beside_it_is_a_model(base: Path) -> None:
    save_file({"b": torch.ones(1)}, base / "adapter_model.safetensors")
    (base / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert "model.embed_tokens.weight" in read_index(base).tensors
    assert read_index(base).skipped_files == (Path("adapter_model.safetensors"),)


def test_inspect_describes_an_adapter(adapter: Path) -> None:
    found = inspect(adapter)
    assert (found.kind, found.nbytes, len(found.tensors)) == ("adapter", 4 * 2 * (96 + 130), 2)
    assert found.summary == ADAPTER
    assert {row["compress would"] for row in found.tensors} == {"refuse it"}
    shown = invoke("inspect", adapter).stdout
    assert "base_model_name_or_path: org/base" in shown
    assert "note: compress and inject take models" in shown
    with pytest.raises(SpectralSurgeryError, match="adapter: expected a model for --spectrum, got an adapter"):
        inspect(adapter, spectrum=True)


def test_inspect_and_compress_agree_about_a_quantised_checkpoint(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "quantised", llama_like(), config={"quantization_config": {"quant_method": "hqq"}})
    refused = str(invoke("compress", source, tmp_path / "out", "--bits", "4").exception)
    found = inspect(source)
    assert refused == f"{tmp_path / 'quantised'}: {found.notes[0].removeprefix('compress refuses it: ')}"
    assert "got one quantised already (hqq)" in refused
    assert found.kind == "quantised"
    assert {row["compress would"] for row in found.tensors} == {"refuse it"}
    with pytest.raises(SpectralSurgeryError, match="quantised: expected a plain checkpoint, got one quantised already"):
        inspect(source, spectrum=True)


def round_trip(source: Path, tmp_path: Path) -> Path:
    assert invoke("compress", source, tmp_path / "out", "--bits", "8", "-q").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    done = invoke("decompress", tmp_path / "out", tmp_path / "plain", "--verify", "-q")
    assert done.exit_code == 0, done.output
    return tmp_path / "plain"


def test_a_part_of_a_pipeline_keeps_its_file_name(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    save_file({"a.weight": gaussian(64, 64)}, unet / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (unet / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    plain = round_trip(unet, tmp_path)
    assert [path.name for path in plain.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert load_file(plain / "diffusion_pytorch_model.safetensors")["a.weight"].shape == (64, 64)


def test_a_lone_file_keeps_its_name(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({"a.weight": gaussian(64, 64)}, file, {"format": "pt"})
    assert (round_trip(file, tmp_path) / file.name).exists()


def test_a_model_of_transformers_gets_the_name_that_transformers_reads(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", llama_like())
    (base / "model.safetensors").rename(base / "weights.safetensors")
    assert (round_trip(base, tmp_path) / "model.safetensors").exists()


def test_names_of_shards_and_of_hostile_files(tmp_path: Path) -> None:
    entries = [tensor_entry(f"t{number}", gaussian(8, 8)) for number in range(2)]
    write_checkpoint(tmp_path, entries, max_shard_size=256, name="diffusion_pytorch_model")
    index = read_index(tmp_path)
    assert index.files[0].name == "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert (tmp_path / f"diffusion_pytorch_{INDEX_FILE}").exists()
    assert weights_name(index) == "diffusion_pytorch_model"
    for number, hostile in enumerate(("../evil", "/evil", "a/b", ".hidden", "")):
        folder = tmp_path / f"hostile{number}"
        folder.mkdir()
        metadata = weights_metadata(index) | {"weights_name": hostile}
        save_file({"a": torch.ones(1)}, folder / "model.safetensors", metadata)
        assert weights_name(read_index(folder)) == "model"


def test_what_an_index_has_too_many_is_said(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama_like(), shards=2)
    index = json.loads((source / INDEX_FILE).read_text())
    index["weight_map"]["not.there"] = next(iter(index["weight_map"].values()))
    (source / INDEX_FILE).write_text(json.dumps(index))
    said = f"note: {INDEX_FILE}: 1 of its names are in no file, and are left out: 'not.there'."
    assert said in invoke("inspect", source).stdout
    assert said in invoke("compress", source, tmp_path / "out", "--bits", "4", "-q").stdout
    body = json.loads(invoke("compress", source, tmp_path / "o", "--bits", "4", "--dry-run", "--json").stdout)
    assert [f"note: {note}" for note in body["notes"]] == [said]


def test_an_adapter_without_a_base_is_refused_too(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"expected a model, got an adapter \(None\) for a base model"):
        read_index(tmp_path)
