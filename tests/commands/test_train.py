"""Training adapters: data in every format, what is kept, resuming, and two processes like one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.fourierft import FourierFTConfig
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.peft.adapter_files import read_adapter
from spectral_surgery.targets import ModuleTargets

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from spectral_surgery.commands.train import train
from spectral_surgery.hf.models import load_model
from spectral_surgery.live.attach import load
from spectral_surgery.text.settings import TrainData
from spectral_surgery.text.tasks import TASKS, spearman
from spectral_surgery.training.pretrain import prediction_scores
from spectral_surgery.training.settings import TrainSettings
from tests.support.command import run
from tests.support.tiny import WORDS, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[i % 10] for i in range(600)))
    return file


def fourierft(*targets: str) -> AdapterSpec:
    return AdapterSpec(
        METHODS["fourierft"], FourierFTConfig(n_frequency=40, scaling=20.0), ModuleTargets(targets or None)
    )


def settings(steps: int = 12, **fields: object) -> TrainSettings:
    return TrainSettings(5e-2, 1e-2, steps=steps, batch_size=4, eval_every=6, device="cpu", **fields)


def test_a_language_model_learns_and_writes_everything_down(tmp_path: Path, llama: Path, text: Path) -> None:
    out = tmp_path / "out"
    seen: list[int] = []
    report = train(
        llama,
        out,
        TrainData(text, seq_length=16),
        fourierft(),
        settings(),
        progress=lambda done, _, __: seen.append(done),
    )
    assert report.task == "causal-lm"
    assert report.after["loss"] < report.before["loss"]
    assert report.trainable_parameters == 2 * 40
    assert seen == list(range(1, 13))
    written = json.loads((out / "metrics.json").read_text())
    assert written["after"] == report.after
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "runs").glob("events*"))
    state = read_adapter(out)
    assert set(state.layers) == {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}
    assert state.spec.task_type == "CAUSAL_LM"
    weights = sum(file.stat().st_size for file in (out / "checkpoints").rglob("*.safetensors"))
    assert weights < 4000  # adapters alone, not the model


def test_gradient_checkpointing_changes_memory_and_not_numbers(tmp_path: Path, llama: Path, text: Path) -> None:
    data = TrainData(text, seq_length=16)
    plain = train(llama, tmp_path / "plain", data, fourierft(), settings(6))
    less = train(llama, tmp_path / "less", data, fourierft(), settings(6, gradient_checkpointing=True))
    assert less.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-5)


def test_resuming_ends_where_an_uninterrupted_run_ends(tmp_path: Path, llama: Path, text: Path) -> None:
    data = TrainData(text, seq_length=16)
    whole = train(llama, tmp_path / "whole", data, fourierft(), settings(scheduler="constant"))
    train(llama, tmp_path / "parts", data, fourierft(), settings(6, scheduler="constant"))
    parts = train(llama, tmp_path / "parts", data, fourierft(), settings(scheduler="constant"), resume=True)
    assert parts.history.steps == 12
    a, b = read_adapter(tmp_path / "whole"), read_adapter(tmp_path / "parts")
    assert parts.history.best_step == whole.history.best_step
    for layer, tensors in a.layers.items():
        torch.testing.assert_close(tensors["spectrum"], b.layers[layer]["spectrum"], rtol=1e-4, atol=1e-5)
    assert parts.after["loss"] == pytest.approx(whole.after["loss"], rel=1e-4)
    with pytest.raises(
        CheckpointError, match=r"whole: expected a new or empty.*--resume to go on with it, or --overwrite"
    ):
        train(llama, tmp_path / "whole", data, fourierft(), settings())


def write_pairs(file: Path, labels: tuple[str, ...]) -> Path:
    rows = [f"{WORDS[i % 10]} {WORDS[i % 3]},{WORDS[(i * 7) % 10]},{labels[i % len(labels)]}" for i in range(40)]
    file.write_text("\n".join(rows))
    return file


@pytest.mark.parametrize(
    ("labels", "task", "measure"),
    [
        (("0.5", "1.5", "2.25"), "regression", "spearman"),
        (("0", "1"), "classification", "accuracy"),
        (("0.5", "1.5", "2.25"), "similarity", "spearman"),
    ],
)
def test_pairs_with_labels(tmp_path: Path, bert: Path, labels: tuple[str, ...], task: str, measure: str) -> None:
    data = TrainData(write_pairs(tmp_path / "pairs.csv", labels), task="similarity" if task == "similarity" else None)
    report = train(bert, tmp_path / "out", data, fourierft("query", "value"), settings(6, patience=3))
    assert report.task == task
    assert measure in report.before
    assert measure in report.after
    extra = read_adapter(tmp_path / "out").extra
    assert set(extra) == (set() if task == "similarity" else {"classifier.weight", "classifier.bias"})


def test_data_that_does_not_fit_says_so(tmp_path: Path, bert: Path, llama: Path, text: Path) -> None:
    out = tmp_path / "out"
    pairs = write_pairs(tmp_path / "pairs.csv", ("good", "bad"))
    cases = [
        (bert, TrainData(text, task="regression"), "--task regression: expected a label in the last column, got none"),
        (
            bert,
            TrainData(pairs, task="similarity", columns=()),
            "similarity: expected numbers as labels, got '(good|bad)'",
        ),
        (llama, TrainData(text, eval_fraction=1.5), r"expected numbers above 0 with a sum below 1, got 1\.5"),
        (
            llama,
            TrainData(tmp_path / "gone.txt"),
            r"gone\.txt: expected a text, \.csv or \.jsonl file.* got no such file",
        ),
    ]
    for base, data, match in cases:
        with pytest.raises(ConfigError, match=match):
            train(base, out, data, fourierft(), settings())
    short = tmp_path / "short.txt"
    short.write_text("red")
    with pytest.raises(ConfigError, match="data: expected two or more tokens"):
        train(llama, out, TrainData(short, short), fourierft(), settings())
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(json.dumps({"text": "red", "label": i / 7}) for i in range(9)))
    with pytest.raises(ConfigError, match="similarity: expected two text columns and a score, got 1"):
        train(bert, out, TrainData(one, task="similarity"), fourierft("query"), settings())
    with pytest.raises(CheckpointError, match="has no tokenizer that can be loaded"):
        train(tmp_path, out, TrainData(text), fourierft(), settings())
    assert not out.exists()


def test_spearman_gives_ties_their_mean_rank() -> None:
    import numpy as np
    from scipy.stats import spearmanr

    a, b = np.array([1.0, 2, 2, 3, 9]), np.array([2.0, 1, 4, 4, 4])
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, np.ones(5)) == 0


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path, llama: Path, text: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(" ".join(WORDS[i % 7] for i in range(64)))  # equal shares for both processes
    arguments = ["train", str(llama), "--data", str(text), "--eval-data", str(held_out), "--seq-length", "16"]
    # not q_proj, whose first gradients are mere rounding here, of which Adam makes full steps
    arguments += ["--target-modules", "v_proj,down_proj", "--method", "fourierft", "-o"]
    arguments += ["n_frequency=40", "-o", "scaling=20", "--steps", "6", "--batch-size", "4", "--eval-every", "6"]
    arguments += ["--lr", "0.05", "--device", "cpu", "--json", "-q"]
    one = [sys.executable, "-m", "spectral_surgery", *arguments[:2], str(tmp_path / "one"), *arguments[2:]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    two = [*launch, "spectral_surgery", *arguments[:2], str(tmp_path / "two"), *arguments[2:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    reports = []
    for command in (one, two):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        reports.append(json.loads(done.stdout))
    assert reports[1]["before"]["loss"] == pytest.approx(reports[0]["before"]["loss"], rel=1e-5)
    curves = [[loss for _, loss in report["train_loss"]] for report in reports]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert reports[1]["after"]["loss"] < reports[1]["before"]["loss"]
    for name, report in zip(("one", "two"), reports, strict=True):  # what was saved is what was judged
        model, tokenizer = load_model(llama, "AutoModelForCausalLM", dtype=torch.float32)
        load(model, read_adapter(tmp_path / name))
        rows = TASKS["causal-lm"].encode(tokenizer, [(held_out.read_text(),)], 16)
        assert prediction_scores(model, rows, 4)["loss"] == pytest.approx(report["after"]["loss"], rel=1e-5)
    assert reports[1]["after"]["loss"] == pytest.approx(reports[0]["after"]["loss"], rel=1e-5)
    alone, together = (read_adapter(tmp_path / name).layers for name in ("one", "two"))
    for name, tensors in alone.items():  # processes that trained apart were a fifth of the way from it
        difference = torch.linalg.vector_norm(together[name]["spectrum"] - tensors["spectrum"])
        assert difference < 1e-4 * torch.linalg.vector_norm(tensors["spectrum"])


def test_a_classifier_of_other_labels_gets_a_new_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    rows = [f"{WORDS[i % 10]} {WORDS[(3 * i) % 10]},{i % 2}" for i in range(40)]
    (tmp_path / "two.csv").write_text("\n".join(["text,label", *rows]))
    arguments = ("--task", "classification", "--method", "lora", "-o", "r=2", "--steps", "2", "--device", "cpu", "-q")
    done = run("train", tmp_path / "model", tmp_path / "out", "--data", tmp_path / "two.csv", *arguments)
    assert done.returncode == 0, done.stderr
    assert "new, random at the start: classifier.bias, classifier.weight" in done.stderr
    assert read_adapter(tmp_path / "out").extra["classifier.weight"].shape == (2, 16)
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert told["new_weights"] == ["classifier.bias", "classifier.weight"]
    (tmp_path / "three.csv").write_text(
        "\n".join(["text,label", *(f"{row[:-1]}{i % 3}" for i, row in enumerate(rows))])
    )
    done = run("train", tmp_path / "model", tmp_path / "same", "--data", tmp_path / "three.csv", *arguments)
    assert done.returncode == 0, done.stderr
    assert "new, random" not in done.stderr  # three labels, as the model has


def test_other_misfits_than_the_head_are_refused(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    (tmp_path / "two.csv").write_text("\n".join(["text,label", *(f"{WORDS[i % 10]},{i % 2}" for i in range(40))]))
    arguments = ("--task", "classification", "--method", "lora", "--steps", "2", "--device", "cpu", "-q")
    done = run("train", folder, tmp_path / "out", "--data", tmp_path / "two.csv", *arguments)
    assert done.returncode == 1
    assert "expected a head of another size at most, got other shapes than config.json says of bert" in done.stderr
