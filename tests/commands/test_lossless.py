"""compress --lossless: the same bits by every way back, in fewer bytes; and what is copied beside spectra."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_surgery import export_model, load_compressed
from spectral_surgery.cards.check import check_folder
from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.export.compressed_tensors import IntegerSettings
from spectral_surgery.commands.inspect import inspect
from spectral_surgery.errors import CheckpointError, ConfigError, LimitError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.manifest import FILE_NAME, parse_manifest
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_flat, read_tensor
from tests.support.checkpoints import contents, gaussian, write_folder
from tests.support.compressed import FAMILIES, dense_model, output

LOSSLESS = CompressOptions(Target("lossless", 0.0))
Made = Callable[..., Path]


def tensors() -> dict[str, Tensor]:
    """Weights in every dtype, and numbers that are no weights."""
    odd = gaussian(70, 100, seed=5)
    odd[3, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    odd.view(torch.int32)[4, :3] = torch.tensor([1, 0x7FC01234, -1])  # a denormal, and two more kinds of NaN
    return {
        "a.bf16": gaussian(300, 100, seed=1, dtype=torch.bfloat16),
        "a.f16": gaussian(300, 100, seed=2, dtype=torch.float16),
        "a.f32": gaussian(300, 100, seed=3),
        "a.f64": gaussian(300, 20, seed=4).double(),
        "a.f8": (gaussian(300, 100, seed=6) * 100).to(torch.float8_e4m3fn),
        "a.odd": odd,
        "b.positions": torch.arange(3000),
        "b.noise": torch.randint(0, 256, (9000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        "b.norm": torch.ones(100),
        "c.large": gaussian(70, 9000, seed=7, dtype=torch.bfloat16),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", tensors())


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    compress(source, tmp_path / "small", LOSSLESS)
    return tmp_path / "small"


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_every_bit_comes_back(source: Path, folder: Path, tmp_path: Path) -> None:
    report = decompress(folder, tmp_path / "plain", verify=True)
    assert report.verified
    assert not report.failures
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "plain"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        assert torch.equal(bits(tensor), bits(after[name])), name
    assert (source / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_what_saves_no_bytes_is_copied(folder: Path) -> None:
    checkpoint = open_compressed(folder)
    stored = load_file(folder / "model.safetensors")
    assert {"b.noise", "b.norm"} <= stored.keys()
    assert "b.positions" in checkpoint.manifest.lossless
    assert not {"b.noise", "b.norm"} & checkpoint.manifest.lossless.keys()
    sizes = {name: checkpoint.index.tensors[name] for name in checkpoint.manifest.lossless}
    assert all(info.stored_bytes < info.nbytes for info in sizes.values())
    large = sizes["c.large"]
    assert large.stored_bytes < 0.68 * large.nbytes


def test_rows_can_be_read_alone(source: Path, folder: Path) -> None:
    info, whole = open_compressed(folder).index.tensors["c.large"], load_file(source / "model.safetensors")["c.large"]
    assert len(info.decoder.record.parts[0].crc32) == 2  # type: ignore[union-attr]
    for start, stop in ((0, 5), (530_000, 540_000), (629_999, 630_000), (7, 7)):
        assert torch.equal(read_flat(info, start, stop), whole.reshape(-1)[start:stop])
    assert torch.equal(read_tensor(info), whole)


def test_workers_and_interruptions_do_not_show(source: Path, folder: Path, tmp_path: Path) -> None:
    from spectral_surgery.run import Run

    compress(source, tmp_path / "again", LOSSLESS, run=Run(workers=2, threads=2))
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_same_model(tmp_path: Path, family: str) -> None:
    import transformers

    model = dense_model(family)
    model.save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "small", LOSSLESS)
    auto = getattr(transformers, FAMILIES[family][1])
    loaded = auto.from_pretrained(tmp_path / "small").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(output(loaded), output(model))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.hf_quantizer.held_dense
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(auto.from_pretrained(tmp_path / "saved").eval()), output(model))


@pytest.mark.parametrize(
    ("family", "left"), [("llama_tied", "*embed*"), ("qwen3_moe", "*experts*"), ("vit", "*patch*")]
)
def test_beside_spectra(tmp_path: Path, family: str, left: str) -> None:
    """What is excluded is coded, or copied as it is; the model is the same."""
    model = dense_model(family)
    model.save_pretrained(tmp_path / "source")
    found = {}
    for copy in ("coded", "plain"):
        options = CompressOptions(Target("bits", 4.0), exclude=(left,), min_weights=1000, copy=copy)  # type: ignore[arg-type]
        compress(tmp_path / "source", tmp_path / copy, options)
        checkpoint = open_compressed(tmp_path / copy)
        assert bool(checkpoint.manifest.lossless) == (copy == "coded")
        found[copy] = output(load_compressed(tmp_path / copy, dtype=torch.float32))
    assert torch.equal(found["coded"], found["plain"])
    sizes = [(tmp_path / copy / "model.safetensors").stat().st_size for copy in ("coded", "plain")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe", "vit"])
def test_loads_in_the_dtype_that_is_asked_for(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """As the plain folder does; also what is coded beside spectra."""
    model = dense_model(family).bfloat16()
    model.save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", LOSSLESS)
    auto = type(model)
    plain = auto.from_pretrained(tmp_path / "source", dtype=dtype).eval()
    loaded = auto.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert {name: x.dtype for name, x in loaded.state_dict().items()} == {
        name: x.dtype for name, x in plain.state_dict().items()
    }
    assert torch.equal(output(loaded), output(plain))


def test_other_commands_know_such_folders(folder: Path, tmp_path: Path) -> None:
    found = inspect(folder)
    assert found.summary["lossless_tensors"] == len(open_compressed(folder).manifest.lossless)
    assert {row["relative_error"] for row in found.tensors} == {0.0}
    stored, infos = open_compressed(folder), read_index(folder).tensors
    coded = sum(info.nbytes for name, info in infos.items() if ".lossless_" in name)
    plain = sum(info.nbytes for name, info in stored.index.tensors.items() if name in stored.manifest.lossless)
    assert found.summary["lossless_of_original"] == pytest.approx(coded / plain, rel=1e-2)
    assert not {"weights", "bits_per_weight", "relative_error", "density"} & found.summary.keys()
    assert check_folder(folder).kind == "compressed"
    card = (folder / "README.md").read_text()
    assert "spectral-surgery compress SOURCE OUT --lossless" in card
    assert "- coded without loss: " in card
    done = CliRunner().invoke(cli, ["report", str(folder), "-o", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    assert "coded without loss" in (tmp_path / "report.html").read_text()


def test_exports_read_them(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "small", LOSSLESS)
    small, plain = (
        export_model(tmp_path / name, tmp_path / f"{name}-out", "compressed-tensors", IntegerSettings(8))
        for name in ("small", "source")
    )
    assert [tensor.to_json() for tensor in small.tensors] == [tensor.to_json() for tensor in plain.tensors]
    assert small.tensors


def damaged(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads((folder / FILE_NAME).read_text())
    change(body["lossless"]["c.large"])
    (folder / FILE_NAME).write_text(json.dumps(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(shape=[70, 9001]),
        lambda record: record.update(columns=0),
        lambda record: record.update(per_frame=1 << 40),
        lambda record: record.update(dtype="BOOL3"),
        lambda record: record["parts"][0].update(numbers=[0, 5]),
        lambda record: record["parts"][0].update(centres=[1]),
        lambda record: record["parts"][0].update(centres=[999, None]),
        lambda record: record["parts"][0].update(crc32=[1]),
    ],
)
def test_impossible_sizes_are_refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    damaged(folder, change)
    with pytest.raises((LimitError, CheckpointError), match=r"c\.large"):
        open_compressed(folder)


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    info = open_compressed(folder).index.tensors["c.large"]
    raw = bytearray(file.read_bytes())
    raw[info.start + 1000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"^c\.large: expected frame 0 with its checksum, got another one"):
        decompress(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(CheckpointError, match="checksum"):
        check_folder(folder)


def test_missing_codes_are_named(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["c.large.lossless_frames"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"^c\.large: expected codes as the manifest says, got none"):
        open_compressed(folder)


def test_it_goes_with_nothing_that_loses_bits(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lossless: expected without --base, --calibrate and --heal"):
        compress(source, tmp_path / "out", LOSSLESS, base=source)
    for more in (("--bits", "4"), ("--max-error", "0.1")):
        done = CliRunner().invoke(cli, ["compress", str(source), str(tmp_path / "out"), "--lossless", *more])
        assert done.exit_code == 2


def test_the_command(source: Path, tmp_path: Path) -> None:
    arguments = ["compress", str(source), str(tmp_path / "out"), "--lossless"]
    plan = CliRunner().invoke(cli, [*arguments, "--dry-run", "--json"])
    body = json.loads(plan.stdout)
    assert 0.6 * body["input_bytes"] < body["predicted_bytes"] < 0.9 * body["input_bytes"]
    done = CliRunner().invoke(cli, [*arguments, "-q"])
    assert "8 tensors coded without loss, 2 copied as they are." in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["lossless"] is True


def test_a_manifest_without_such_tensors_is_as_it_was(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source)
    write_folder(source, {"a.weight": gaussian(64, 64), "b": torch.ones(3)})
    compress(source, tmp_path / "out", CompressOptions(Target("bits", 4.0)))
    body = json.loads((tmp_path / "out" / FILE_NAME).read_text())
    assert "lossless" not in body
    assert parse_manifest(body).lossless == {}
