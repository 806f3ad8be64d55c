"""compress --calibrate: better outputs at the same rate, the rate met, resumable, and right for every kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run

pytest.importorskip("transformers")

from spectral_surgery.hf.models import load_model
from spectral_surgery.text.settings import TextData
from tests.commands.test_train import WORDS, save_tokenizer

KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}),
    "bert": ("BertConfig", "BertModel", {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 2}),
}


def save_model(kind: str, folder: Path) -> Path:
    import transformers

    config, model, sizes = KINDS[kind]
    names = {} if kind == "gpt2" else {"num_attention_heads": 2}
    torch.manual_seed(0)
    own = getattr(transformers, config)(vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes, **names)
    getattr(transformers, model)(own).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_text(file: Path) -> Path:
    """Two hundred lines of words in random order."""
    generator = torch.Generator().manual_seed(0)
    lines = [
        " ".join(WORDS[i] for i in torch.randint(0, 10, (int(n),), generator=generator))
        for n in torch.randint(3, 9, (200,), generator=generator)
    ]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module", params=list(KINDS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp(request.param) / "model")


def hidden(folder: Path) -> torch.Tensor:
    model, _ = load_model(folder, "AutoModel", dtype=torch.float32)
    ids = torch.randint(2, 12, (20, 8), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        return model(input_ids=ids).last_hidden_state


def test_outputs_are_better_at_the_same_rate(tmp_path: Path, source: Path, text: Path) -> None:
    blocks = {"llama": "*proj*", "bert": "encoder*", "gpt2": "*.h.*"}
    include = next(glob for kind, glob in blocks.items() if source.parent.name.startswith(kind))
    options = CompressOptions(Target("bits", 2.5), include=(include,), allocation="even")
    plain = compress(source, tmp_path / "plain", options)
    with_text = compress(source, tmp_path / "text", options, calibrate=TextData(text, 64, 16))
    assert plain is not None
    done = with_text.calibration.layers if with_text.calibration else ()
    assert len(done) == len(with_text.manifest.tensors)
    assert all(0 < own.output_error < 0.5 for own in done)
    bits = with_text.manifest.report.bits_per_weight
    assert bits == pytest.approx(plain.manifest.report.bits_per_weight, rel=0.02)
    original = hidden(source)
    errors = []
    for name in ("plain", "text"):
        decompress(tmp_path / name, tmp_path / f"{name}-dense", verify=True)
        errors.append(float((hidden(tmp_path / f"{name}-dense") - original).norm()))
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_the_output_layer_is_calibrated_by_the_last_hidden_states(tmp_path: Path, text: Path, tied: bool) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=96, pad_token_id=0, tie_word_embeddings=tied, **sizes)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    include = ("*embed*" if tied else "*head*", "*proj*")
    options = CompressOptions(Target("bits", 2.5), include=include, allocation="even")
    compress(tmp_path / "model", tmp_path / "plain", options)
    report = compress(tmp_path / "model", tmp_path / "text", options, calibrate=TextData(text, 64, 16))
    assert report.calibration is not None
    assert "words" in {own.block for own in report.calibration.layers}
    states, exact = hidden(tmp_path / "model").reshape(-1, 64), model.lm_head.weight.detach()
    errors, stored = [], []
    for name in ("plain", "text"):
        checkpoint = open_compressed(tmp_path / name)
        (tensor,) = (own for own in checkpoint.manifest.tensors if own.endswith(("head.weight", "tokens.weight")))
        errors.append(float((states @ (checkpoint.part(tensor, 0).to_dense() - exact).T).norm()))
        stored.append(checkpoint.manifest.tensors[tensor].report.stored_bytes)
    assert stored[1] == pytest.approx(stored[0], rel=0.02)
    assert errors[1] < 0.8 * errors[0]


def test_density_is_met(tmp_path: Path, bert: Path, text: Path) -> None:
    options = CompressOptions(Target("density", 0.2), include=("*encoder*",))
    report = compress(bert, tmp_path / "out", options, calibrate=TextData(text, 64, 16))
    assert report.manifest.report.density == pytest.approx(0.2, abs=0.001)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, bert: Path, text: Path) -> None:
    options, data = CompressOptions(Target("bits", 3.0)), TextData(text, 32, 16)
    compress(bert, tmp_path / "whole", options, calibrate=data)
    seen: list[str] = []

    def stop(done: int, total: int, what: str) -> None:
        seen.append(what)
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(bert, tmp_path / "parts", options, calibrate=data, run=Run(progress=stop))
    with pytest.raises(CheckpointError, match=r"parts\.partial: expected an empty folder, got unfinished work"):
        compress(bert, tmp_path / "parts", options, calibrate=data)
    compress(bert, tmp_path / "parts", options, calibrate=data, run=Run(resume=True))
    for file in ("model.safetensors", "spectral_surgery.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "parts.partial").exists()


def test_what_calibration_does_not_take(tmp_path: Path, bert: Path, text: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--calibrate: expected --bits or --sparsity with it, got --max-error"):
        compress(bert, out, CompressOptions(Target("max_error", 0.1)), calibrate=TextData(text))
    with pytest.raises(ConfigError, match=r"gone: expected a text"):
        compress(bert, out, CompressOptions(Target("bits", 3)), calibrate=TextData(tmp_path / "gone"))
    assert not out.exists()


def test_the_command(tmp_path: Path, bert: Path, text: Path) -> None:
    arguments = ["compress", str(bert), str(tmp_path / "out"), "--bits", "3", "--calibrate", str(text)]
    done = CliRunner().invoke(cli, [*arguments, "--samples", "16", "--seq-length", "16", "--json", "-q"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bits_per_weight"] == pytest.approx(3.0, rel=0.02)
    assert "12 weights calibrated, of 14: " in done.stderr
    assert "numbers; largest error of outputs" in done.stderr
    assert json.loads(done.stdout)["calibration"]["matrices"] == 12
    manifest = json.loads((tmp_path / "out" / "spectral_surgery.json").read_text())
    assert manifest["options"]["calibration"].startswith("16 x 16 tokens of sha256:")
    assert CliRunner().invoke(cli, [*arguments, "--shard", "0/2"]).exit_code != 0


def test_text_without_a_token_is_named(tmp_path: Path, text: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=12, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")  # of words, which Qwen's own tokenizer, made of bytes, does not find
    for allocation in ("even", "slope"):
        options = CompressOptions(Target("bits", 3.0), allocation=allocation)
        with pytest.raises(
            ConfigError,
            match=r"text\.txt: expected text that the model reads",
        ):
            compress(tmp_path / "model", tmp_path / "out", options, calibrate=TextData(text), run=Run(overwrite=True))
    assert not (tmp_path / "out").exists()
