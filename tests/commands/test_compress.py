"""compress and decompress as a user runs them: fidelity, determinism, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress, compress_shard, plan_compression
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError, ConfigError, TargetError
from spectral_surgery.files.compressed import plan as plan_module
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_bytes
from spectral_surgery.files.writer import Entry, tensor_entry, write_file
from spectral_surgery.run import Run
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder

FIFTH = CompressOptions(Target("density", 0.2))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", llama_like())


@pytest.mark.parametrize("target", [Target("density", 0.2), Target("bits", 3.0), Target("max_error", 0.1)])
@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_keeps_names_shapes_and_the_reported_error(tmp_path: Path, target: Target, shards: int) -> None:
    tensors = llama_like()
    source = write_folder(tmp_path / "source", tensors, shards=shards)
    report = compress(source, tmp_path / "out", CompressOptions(target))
    assert report is not None
    back = decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    assert back.failures == ()
    plain = load(tmp_path / "plain")
    assert plain.keys() == tensors.keys()
    assert all(plain[n].dtype == tensors[n].dtype and plain[n].shape == tensors[n].shape for n in tensors)
    for row in report.to_json()["tensors"]:
        original, decoded = tensors[row["name"]].double(), plain[row["name"]].double()
        error = float((original - decoded).norm() / original.norm())
        assert error == pytest.approx(row["relative_error"], abs=0.004)  # bfloat16 rounds by 0.002
    for name in ("model.layers.0.input_layernorm.weight", "model.steps"):
        assert torch.equal(plain[name], tensors[name])
    assert torch.equal(plain["lm_head.weight"], plain["model.embed_tokens.weight"])
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert not (tmp_path / "plain" / "spectral_surgery.json").exists()


def test_report_counts_the_bytes_on_disk(tmp_path: Path, source: Path) -> None:
    report = compress(source, tmp_path / "out", FIFTH)
    assert report is not None
    body = report.to_json()
    stored = load(tmp_path / "out")
    for row in body["tensors"]:
        parts = [v for n, v in stored.items() if n.startswith(row["name"] + ".spectral_")]
        assert len(parts) == 3
        nbytes = sum(p.numel() * p.element_size() for p in parts)
        weights = row["shape"][0] * row["shape"][1]
        assert 8 * nbytes / weights == pytest.approx(row["bits_per_weight"], rel=1e-12)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name.startswith(("model", "spectral")))
    assert body["output_bytes"] == on_disk
    assert {row["name"] for row in body["skipped"]} == {"model.layers.0.input_layernorm.weight", "model.steps"}
    assert body["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "spectral_surgery"


def test_same_bytes_whatever_the_workers_threads_and_shards(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "one", FIFTH)
    compress(source, tmp_path / "threads", FIFTH, run=Run(threads=3))
    compress(source, tmp_path / "workers", FIFTH, run=Run(workers=2))
    results = [compress_shard(source, tmp_path / "shards", FIFTH, (i, 3)) for i in (2, 0, 1)]
    assert [r is None for r in results] == [True, True, False]
    expected = contents(tmp_path / "one")
    for other in ("threads", "workers", "shards"):
        assert contents(tmp_path / other) == expected
    assert not list(tmp_path.glob("*.partial"))


def test_parts_of_a_large_tensor_decode_like_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(9000, 300)
    source = write_folder(tmp_path / "source", {"w": weight})
    monkeypatch.setattr(plan_module, "PART_WEIGHTS", 1 << 20)
    report = compress(source, tmp_path / "out", CompressOptions(Target("bits", 4.0)))
    assert report is not None
    assert len(report.manifest.tensors["w"].parts) == 3
    assert decompress(tmp_path / "out", tmp_path / "plain", verify=True).failures == ()
    error = (load(tmp_path / "plain")["w"] - weight).norm() / weight.norm()
    assert float(error) == pytest.approx(report.manifest.report.relative_error, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "axes", "parts"),
    [
        ("model.embed_tokens.weight", (200, 64), (1,), 1),
        ("transformer.h.0.attn.c_attn.weight", (96, 288), (0, 1), 1),
        ("vit.embeddings.patch_projection.weight", (64, 3, 8, 8), (1,), 1),
        ("features.conv.weight", (64, 32, 3, 3), (0, 1), 1),
        ("model.layers.0.mlp.experts.gate_up_proj", (5, 64, 96), (0, 1), 5),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (64, 96), (0, 1), 1),
    ],
)
def test_every_kind_of_tensor(
    tmp_path: Path, name: str, shape: tuple[int, ...], axes: tuple[int, ...], parts: int
) -> None:
    weight = gaussian(*shape)
    source = write_folder(tmp_path / "source", {name: weight})
    report = compress(source, tmp_path / "out", CompressOptions(Target("max_error", 0.05)))
    assert report is not None
    record = report.manifest.tensors[name]
    assert (record.axes, len(record.parts)) == (axes, parts)
    decompress(tmp_path / "out", tmp_path / "plain")
    plain = load(tmp_path / "plain")[name]
    assert plain.shape == shape
    assert float((plain - weight).norm() / weight.norm()) <= 0.05 * 1.001


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = gaussian(128, 96).mul(20).to(dtype)
    source = write_folder(tmp_path / "source", {"w": weight, "ids": torch.arange(9000).reshape(90, 100)})
    compress(source, tmp_path / "out", CompressOptions(Target("bits", 6.0)))
    report = decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    plain = load(tmp_path / "plain")
    assert plain["w"].dtype == dtype
    assert report.failures == ()
    error = (plain["w"].double() - weight.double()).norm() / weight.double().norm()
    assert float(error) < 0.03 + torch.finfo(dtype).eps / 2
    assert torch.equal(plain["ids"], torch.arange(9000).reshape(90, 100))


def test_decompress_dtype_casts_every_floating_tensor(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "out", FIFTH)
    decompress(tmp_path / "out", tmp_path / "plain", dtype="float32", verify=True)
    kinds = {v.dtype for v in load(tmp_path / "plain").values()}
    assert kinds == {torch.float32, torch.int64}
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(ConfigError, match=r"--dtype: expected float64, float32,.*got float31"):
        decompress(tmp_path / "out", tmp_path / "other", dtype="float31")


def test_verify_fails_when_the_manifest_lies_about_the_norm(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "out", FIFTH)
    path = tmp_path / "out" / "spectral_surgery.json"
    body = json.loads(path.read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    body["tensors"][name]["parts"][0]["report"]["stored_energy"] *= 1.5
    path.write_text(json.dumps(body))
    report = decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    assert len(report.failures) == 1
    assert name in report.failures[0]
    assert not (tmp_path / "plain").exists()


def test_elements_smaller_than_a_byte_are_copied(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    packed = Entry("packed", "F4", (7, 4), lambda: [bytes(range(14))])
    write_file(tmp_path / "source" / "model.safetensors", [packed, tensor_entry("weight", gaussian(64, 64))])
    compress(tmp_path / "source", tmp_path / "out", FIFTH)
    assert decompress(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", verify=True).failures == ()
    stored = read_index(tmp_path / "plain").tensors["packed"]
    assert (stored.dtype, stored.shape, read_bytes(stored, 0, 14)) == ("F4", (7, 4), bytes(range(14)))
    assert decompress(tmp_path / "out", tmp_path / "same", verify=True).failures == ()


def test_include_exclude_and_small_tensors(source: Path) -> None:
    options = CompressOptions(Target("bits", 4.0), include=("model.layers.*",), exclude=("*q_proj*",))
    _, plan = plan_compression(source, options)
    assert [t.info.name for t in plan.tensors] == ["model.layers.0.mlp.down_proj.weight"]
    assert plan.copied["model.layers.0.self_attn.q_proj.weight"] == "excluded"
    with pytest.raises(TargetError, match=r"--include:.*got 'nothing\.\*', which matches none of 6 tensors"):
        plan_compression(source, CompressOptions(Target("bits", 4.0), include=("nothing.*",)))
    with pytest.raises(ConfigError, match="expected a matrix to compress, got none"):
        plan_compression(source, CompressOptions(Target("bits", 4.0), min_weights=10**9))


def test_auto_takes_the_transform_that_compacts(tmp_path: Path) -> None:
    phase = torch.linspace(0, 3, 256)
    smooth = torch.outer(torch.cos(2 * phase), torch.sin(phase)) + 1e-3 * gaussian(256, 256)
    spiky = torch.zeros(256, 256)
    spiky.view(-1)[:: 257 * 3] = 1.0
    source = write_folder(tmp_path / "source", {"smooth": smooth, "spiky": spiky, "noise": gaussian(256, 256)})
    report = compress(source, tmp_path / "out", CompressOptions(Target("bits", 2.0), transform="auto"))
    assert report is not None
    chosen = {row["name"]: row["transform"] for row in report.to_json()["tensors"]}
    assert chosen["noise"] == "dct"
    assert chosen["smooth"] in ("dct", "hartley")
    assert chosen["spiky"] == "identity"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_or_copied(tmp_path: Path, bad: float) -> None:
    tensors = {"good": gaussian(80, 80), "bad": gaussian(80, 80)}
    tensors["bad"][3, 4] = bad
    source = write_folder(tmp_path / "source", tensors)
    with pytest.raises(
        ConfigError, match=r"bad: expected finite weights, got NaN or infinite values.*--copy-nonfinite"
    ):
        compress(source, tmp_path / "out", FIFTH)
    assert not (tmp_path / "out").exists()
    report = compress(
        source, tmp_path / "out", CompressOptions(Target("density", 0.2), copy_nonfinite=True), run=Run(overwrite=True)
    )
    assert report is not None
    assert report.copied["bad"] == "not finite"
    decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    assert torch.equal(load(tmp_path / "plain")["bad"].view(torch.int32), tensors["bad"].view(torch.int32))


def test_a_quantised_source_is_refused(tmp_path: Path, source: Path) -> None:
    compress(source, tmp_path / "out", FIFTH)
    with pytest.raises(CheckpointError, match=r"out: expected a plain .* \(spectral_surgery\)\. Decompress it first\."):
        compress(tmp_path / "out", tmp_path / "again", FIFTH)


@pytest.mark.parametrize("out", [".", "inside", ".."])
def test_the_source_is_never_overwritten(source: Path, out: str) -> None:
    before = contents(source)
    with pytest.raises(CheckpointError, match="expected a folder apart from the source, got one that overlaps"):
        compress(source, source / out, FIFTH, run=Run(overwrite=True))
    with pytest.raises(CheckpointError, match="expected a folder apart from the source, got one that overlaps"):
        decompress(source, source / out, overwrite=True)
    assert contents(source) == before


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shard_out_of_range(tmp_path: Path, source: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="shard: expected 0/n to n-1/n, got"):
        compress_shard(source, tmp_path / "out", FIFTH, shard)
