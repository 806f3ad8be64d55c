"""Training from nothing: what is written, that parts do not overlap, resuming, tokenizers, and generating with it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery import cli
from spectral_surgery.commands.generate import generate
from spectral_surgery.commands.settings import Running
from spectral_surgery.commands.train.from_scratch import ScratchReport, train_from_scratch
from spectral_surgery.errors import BackendError, CheckpointError, ConfigError
from spectral_surgery.hf.settings import Sampling
from spectral_surgery.text.settings import ScratchData
from spectral_surgery.training import tokenizers as text_tokenizers
from spectral_surgery.training.pretrain import STARTS, prediction_scores, unigram, vocabulary_of
from spectral_surgery.training.settings import ModelSizes, TrainSettings
from spectral_surgery.training.tokenizers import END, learn_bpe, tiktoken_named

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SIZES = ModelSizes(d_model=16, num_layers=1, num_heads=4, mlp_hidden_dim=4, max_seq_length=24, kernel_length=8, chunk=6)
SETTINGS = TrainSettings(1e-2, 1e-2, steps=8, batch_size=8, eval_every=4, device="cpu", scheduler="constant")
LINES = "\n".join(f"the {what} is {how}" for what in ("cat", "dog", "sun") for how in ("red", "small", "far", "here"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text((LINES + "\n") * 12)
    return file


def run(file: Path, out: Path, start: str = "fftnet", **changes: Any) -> ScratchReport:
    data = ScratchData(file, vocabulary=280, seq_length=16)
    own = {"control": None, "resume": False, "overwrite": False, "settings": SETTINGS, "sizes": SIZES, "data": data}
    own |= changes
    return train_from_scratch(
        *(start, out, own["data"], own["sizes"], own["settings"]),
        control=own["control"],
        resume=own["resume"],
        overwrite=own["overwrite"],
    )


def test_two_models_learn_and_write_everything_down(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    report = run(text, out, control="transformer")
    ours, control = report.models
    assert (ours.start, control.start, control.folder) == ("fftnet", "transformer", out / "control")
    assert abs(control.parameters / ours.parameters - 1) < 0.02
    for model in report.models:
        before = dict(model.history.held_out)[0]["loss"]
        assert model.test["loss"] < before
        assert model.validation_loss == min(measures["loss"] for _, measures in model.history.held_out[1:])
        assert model.test["perplexity"] == pytest.approx(math.exp(model.test["loss"]))
        assert 0 <= model.test["accuracy"] <= 1
        assert (model.folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
        assert list((model.folder / "runs").glob("events*"))
        made = transformers.AutoModelForCausalLM.from_pretrained(model.folder)
        assert made.num_parameters() == model.parameters
        assert len(transformers.AutoTokenizer.from_pretrained(model.folder)) == report.vocabulary == 280
    written = json.loads((out / "metrics.json").read_text())
    assert [own["test"] for own in written["models"]] == [ours.test, control.test]
    assert written["unigram"] == report.unigram
    assert (written["data"]["file"], written["data"]["seq_length"]) == (str(text), 16)
    assert json.loads((out / "control/metrics.json").read_text())["models"] == [control.to_json()]
    found = generate(out, "the cat", Sampling(max_tokens=100, temperature=0.8, top_k=5), Running())
    assert found.prompt_tokens + found.tokens == 24  # as far as the model reads
    with pytest.raises(ConfigError, match="generate: expected at most 23 tokens of a prompt for this model, got 31"):
        generate(out, "q" * 31, Sampling(), Running())


def test_the_weights_of_the_best_step_are_kept(tmp_path: Path, text: Path) -> None:
    wild = replace(SETTINGS, learning_rate=0.6, steps=12)  # gets worse again
    report = run(text, tmp_path / "out", settings=wild)
    model = report.models[0]
    assert model.history.best_step < 12 or model.history.held_out[-1][1]["loss"] == model.validation_loss
    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    best = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out/checkpoints" / f"checkpoint-{model.history.best_step}"
    )
    for one, other in zip(kept.parameters(), best.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resuming_ends_where_an_uninterrupted_run_ends(tmp_path: Path, text: Path) -> None:
    whole = run(text, tmp_path / "whole")
    run(text, tmp_path / "parts", settings=replace(SETTINGS, steps=4))
    parts = run(text, tmp_path / "parts", resume=True)
    assert parts.models[0].history.steps == 8
    assert parts.models[0].test["loss"] == pytest.approx(whole.models[0].test["loss"], rel=1e-4)
    with pytest.raises(CheckpointError, match="whole: expected a new or empty folder"):
        run(text, tmp_path / "whole")
    again = run(text, tmp_path / "whole", overwrite=True)
    assert again.models[0].test == whole.models[0].test  # the seed decides everything


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path, text: Path) -> None:
    options = ["train", "--init", "fftnet", "--data", str(text), "--vocab-size", "280", "--seq-length", "16"]
    options += [
        "--d-model",
        "16",
        "--num-layers",
        "1",
        "--heads",
        "4",
        "--mlp-hidden-dim",
        "4",
        "--dropout",
        "0",
        "--lr",
        "0.001",
    ]
    options += ["--steps", "6", "--batch-size", "8", "--eval-every", "6", "--device", "cpu", "--json", "-q"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    reports = {}
    for name, launcher in (("one", []), ("two", launch)):
        command = [sys.executable, *launcher, "-m", "spectral_surgery", *options, str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        reports[name] = json.loads(done.stdout)  # of the first process only
    curves = {name: [loss for _, loss in body["models"][0]["train_loss"]] for name, body in reports.items()}
    # where a gradient is all rounding, as behind a head that starts at even odds, Adam makes a full step of it
    fall = curves["one"][0] - curves["one"][-1]
    assert fall > 0.1
    assert curves["two"][:2] == pytest.approx(curves["one"][:2], rel=1e-6)
    assert curves["two"] == pytest.approx(curves["one"], abs=0.1 * fall)
    losses = {name: body["models"][0]["test"]["loss"] for name, body in reports.items()}
    assert losses["two"] == pytest.approx(losses["one"], abs=0.1 * fall)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two").num_parameters()


def test_the_test_part_is_not_learned_from(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab " * 800 + "zzzzyyyy " * 60)  # what ends the text is nowhere else
    run(file, tmp_path / "out")
    vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert not [token for token in vocabulary if "zz" in token]


def test_a_byte_level_bpe_writes_any_text() -> None:
    one, other = (learn_bpe(LINES, 300) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    odd = "né\n\t the cat  日本 \U0001f600"
    assert one.decode(one(odd)["input_ids"]) == odd
    assert one.convert_tokens_to_ids(END) == one.eos_token_id == one.pad_token_id == 0
    assert len(one("the cat is red")["input_ids"]) < 8
    with pytest.raises(ConfigError, match=r"--vocab-size: expected 257 or more, .* got 256"):
        learn_bpe("a", 256)


def test_tokenizers_from_elsewhere(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn_bpe(LINES, 270).save_pretrained(tmp_path / "own")
    data = ScratchData(text, tokenizer=str(tmp_path / "own"), seq_length=16)
    assert run(text, tmp_path / "out", data=data).vocabulary == 270
    with pytest.raises(CheckpointError, match="has no tokenizer that can be loaded"):
        run(text, tmp_path / "b", data=replace(data, tokenizer=str(tmp_path)))
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(BackendError, match="tiktoken: expected it to make the tokenizer gpt2, got none"):
        run(text, tmp_path / "b", data=replace(data, tokenizer="tiktoken:gpt2"))
    for name in ("tokenizers", "transformers.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"tokenizers: expected it to learn one, got none installed\. pip install"):
        learn_bpe("a", 300)
    with pytest.raises(BackendError, match=r"transformers: expected it to build models, got none installed\. pip"):
        run(text, tmp_path / "b")


def test_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" c": 258}
    own = tiktoken.Encoding("own", pat_str=r" ?\p{L}+|\s+|.", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: own)
    tokenizer = tiktoken_named("own")
    assert tokenizer("the cat, né")["input_ids"] == own.encode("the cat, né")
    assert tokenizer.eos_token_id == 259
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"--tokenizer: expected tiktoken: and one of .*gpt2.*, got tiktoken:none"):
        text_tokenizers.tiktoken_named("none")


class Constant(torch.nn.Module):
    """Always the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.row = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return transformers.modeling_outputs.CausalLMOutput(logits=self.row.expand(*input_ids.shape, -1))


def test_measures_are_those_of_the_definition() -> None:
    rows = [{"input_ids": [0, 1, 1]}, {"input_ids": [1, 1, 0]}, {"input_ids": [1, 0, 1]}]
    found = prediction_scores(Constant([math.log(0.25), math.log(0.75)]), rows, 2)
    loss = -(4 * math.log(0.75) + 2 * math.log(0.25)) / 6
    assert found["loss"] == pytest.approx(loss)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["first_token_loss"] == pytest.approx(-(2 * math.log(0.75) + math.log(0.25)) / 3)
    counted = unigram([{"input_ids": [1, 1, 1, 0, 1, 1]}], rows, 2)
    assert counted["loss"] == pytest.approx(loss)
    assert counted["accuracy"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("name", ["fftnet", "transformer"])
def test_models_start_at_even_odds(name: str) -> None:
    torch.manual_seed(0)
    made = STARTS[name].build(SIZES, {"vocab_size": 50})
    rows = [{"input_ids": row} for row in torch.randint(50, (20, 12)).tolist()]
    assert prediction_scores(made, rows, 8)["loss"] == pytest.approx(math.log(50), rel=0.2)


def test_numbers_of_tokens_may_have_gaps() -> None:
    tokenizer = learn_bpe(LINES, 260)
    monkey = {"a": 3, "b": 9}
    tokenizer.get_vocab = lambda: monkey
    assert vocabulary_of(tokenizer)["vocab_size"] == 10


@pytest.mark.parametrize(
    ("start", "changes", "text_of_error"),
    [
        (
            "fftnet",
            {"sizes": replace(SIZES, max_seq_length=8)},
            "--seq-length: expected at most --max-seq-length, 8, got 16",
        ),
        ("fftnet", {"sizes": replace(SIZES, num_heads=5)}, "heads: expected a divisor of the width, 16, got 5"),
        (
            "transformer",
            {"sizes": replace(SIZES, d_model=15, num_heads=3)},
            "--d-model: expected an even number for a Transformer, got 15",
        ),
        ("rnn", {}, "model to start from: expected one of fftnet, transformer, got 'rnn'"),
    ],
)
def test_bad_settings(tmp_path: Path, text: Path, start: str, changes: dict[str, Any], text_of_error: str) -> None:
    with pytest.raises(ConfigError, match=text_of_error):
        run(text, tmp_path / "out", start, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spectral-surgery", "train", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    small = ["--d-model", "16", "--num-layers", "1", "--heads", "4", "--steps", "2", "--seq-length", "16"]
    small += ["--vocab-size", "280", "--device", "cpu", "--no-positions", "--data", str(text)]
    code, out, err = command("--init", "fftnet", str(tmp_path / "a"), *small, "--control", "-q")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["fftnet", "transformer", "frequencies"]
    saved = json.loads((tmp_path / "a/config.json").read_text())
    assert (saved["kernel_length"], saved["max_seq_length"], saved["sinusoidal_positions"]) == (16, 16, False)
    settings = json.loads((tmp_path / "a/metrics.json").read_text())["settings"]
    assert [settings[name] for name in ("learning_rate", "weight_decay", "scheduler")] == [3e-3, 0.01, "cosine"]
    code, out, _ = command("--init=transformer", str(tmp_path / "b"), *small, "--json")
    body = json.loads(out)
    assert (code, body["command"], [own["init"] for own in body["models"]]) == (0, "train", ["transformer"])
    code, _, err = command("--init", "fftnet", str(tmp_path / "a"), *small)
    assert (code, err.count("\n")) == (1, 1)
    code, out, _ = command("--help")
    assert "--init fftnet" in out
