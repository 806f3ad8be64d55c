"""report: pages of what was trained and of what was judged say what the files of metrics say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import Healing, compress
from spectral_surgery.commands.eval import evaluate
from spectral_surgery.commands.report import report
from spectral_surgery.commands.settings import Reference
from spectral_surgery.commands.swap import swap
from spectral_surgery.commands.swap.fit_layers import FitSettings
from spectral_surgery.commands.train import TrainData, train
from spectral_surgery.commands.train.from_scratch import train_from_scratch
from spectral_surgery.files.compressed.plan import CompressOptions
from spectral_surgery.live.swap import SwapSpec
from spectral_surgery.text.settings import EvalData, TextData
from tests.commands.test_calibrate import save_model
from tests.commands.test_report import page_of, section, sections
from tests.commands.test_train import fourierft, settings
from tests.commands.test_train_from_scratch import LINES, SETTINGS, SIZES, ScratchData
from tests.support.command import run
from tests.support.html import facts, parse, rows, tips

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
HEALING = {"steps": 6, "eval_every": 2, "warmup_steps": 1}


def metrics_of(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / name).read_text())
    return body


def test_a_healed_folder_has_its_course(tmp_path: Path, bert: Path, text: Path) -> None:
    from spectral_surgery.training.loop import DistillSettings

    heal = Healing(TextData(text, seq_length=16, batch_size=16), DistillSettings(**HEALING))
    compress(bert, tmp_path / "healed", CompressOptions(Target("density", 0.2)), heal=heal)
    body = metrics_of(tmp_path / "healed", "heal.json")
    page = page_of(tmp_path / "healed", tmp_path / "page.html")
    assert "healed" in page.one("p", kind="kind").text
    healing = section(page, "Healing")
    assert float(facts(healing)["Held-out loss after"]) == pytest.approx(body["held_out_after"], rel=1e-3)
    assert facts(healing)["Step kept"] == str(body["best_step"])
    course = body["curve"]
    assert len(tips(healing, "second")) == len(course["held_out"])
    assert [tip.split(":")[0] for tip in tips(healing, "first")] == [
        f"training, step {step}" for step, _ in course["train"]
    ]
    assert f"kept: step {body['best_step']}" in healing.text
    assert facts(section(page, "How it was made"))["Trained on"].endswith(f"step {body['best_step']} of 6")


def test_a_trained_adapter_has_its_course(tmp_path: Path, bert: Path) -> None:
    data = tmp_path / "pairs.csv"
    lines = [f"red {a},blue {b},{abs(a - b) % 5}" for a in range(12) for b in range(4)]
    data.write_text("\n".join(["first,second,score", *lines]))
    train(bert, tmp_path / "adapter", TrainData(data, task="similarity"), fourierft("query"), settings())
    body = metrics_of(tmp_path / "adapter")
    page = page_of(tmp_path / "adapter", tmp_path / "page.html")
    training = section(page, "Training")
    held_out = {row["held out"]: row for row in rows(training, "Before and after")}
    for name, value in body["after"].items():
        assert name == "epoch" or float(held_out[name]["after"]) == value
        assert name == "epoch" or float(held_out[name]["before"]) == body["before"][name]
    assert facts(training)["Examples"] == f"train {body['examples']['train']}, held_out {body['examples']['held_out']}"
    assert len(tips(training, "first")) == len(body["train_loss"])
    measures = {name for name in body["held_out"][0] if name not in ("step", "epoch")}
    assert len(tips(training, "second")) == len(measures) * len(body["held_out"])
    command = section(page, "How it was made").one("code").text
    assert command.startswith("spectral-surgery train ")
    assert "--method fourierft" in command


def test_a_swapped_model_has_its_layers(tmp_path: Path, text: Path) -> None:
    source = save_model("llama", tmp_path / "source")
    swap(
        source,
        tmp_path / "swapped",
        SwapSpec("causal_spectral_mixing", (0, 1), {"kernel_length": 8}),
        data=TextData(text, seq_length=16),
        training=FitSettings(2, 1),
        judged_on=EvalData(text=text, seq_length=16),
    )
    body = metrics_of(tmp_path / "swapped", "swap.json")
    page = page_of(tmp_path / "swapped", tmp_path / "page.html")
    assert page.one("p", kind="kind").text == "Model with mixers for attention"
    assert facts(page.one("header"))["parameters after"] == f"{body['parameters']['after']:,}"
    layers = rows(page, "Layers")
    assert [float(row["error after"]) for row in layers] == [fit["after"] for fit in body["layer_errors"]]
    assert len(tips(section(page, "How well the new layers fit"), "dot")) == 4
    measures = {row["measure"]: row for row in rows(page, "Measures")}
    assert float(measures["perplexity"]["original"]) == body["measures"]["perplexity_a"]
    assert float(measures["perplexity"]["this model"]) == body["measures"]["perplexity_b"]
    assert {"setting": "kernel_length", "value": "8"} in rows(page, "Settings of the mixer")
    assert "--mixer causal_spectral_mixing" in section(page, "How it was made").one("code").text


def test_a_model_from_nothing_has_its_courses(tmp_path: Path) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text((LINES + "\n") * 12)
    data = ScratchData(file, vocabulary=280, seq_length=16)
    train_from_scratch("fftnet", out, data, SIZES, SETTINGS, control="transformer")
    body = metrics_of(out)
    page = page_of(out, tmp_path / "page.html")
    table = rows(page, "Models")
    assert [row["model"] for row in table] == ["fftnet", "transformer", "unigram"]
    for row, model in zip(table, body["models"], strict=False):
        assert int(row["parameters"]) == model["parameters"]
        assert float(row["perplexity"]) == model["test"]["perplexity"]
    assert {"setting": "file", "value": "text.txt"} in rows(page, "Data")
    for model in body["models"]:
        training = section(page, f"Training of {model['init']}")
        assert len(tips(training, "first")) == len(model["train_loss"])


def test_a_comparison_has_its_models(tmp_path: Path, bert: Path, text: Path) -> None:
    compress(bert, tmp_path / "four", CompressOptions(Target("bits", 4.0)))
    compress(bert, tmp_path / "two", CompressOptions(Target("bits", 2.0)))
    data, reference = EvalData(text=text, seq_length=16, samples=20), Reference((tmp_path / "two",), ("int8",))
    done = evaluate(bert, tmp_path / "four", data, reference=reference)
    file = tmp_path / "eval.json"
    file.write_text(json.dumps({"schema_version": 1, "command": "eval", **done.to_json()}))
    shown = run("report", file, "-o", tmp_path / "page.html")
    assert shown.returncode == 0, shown.stderr
    page = parse((tmp_path / "page.html").read_text())
    assert sections(page) == ["Models", "Rate and quality", "Measures", "Tensors that differ"]
    table = rows(page, "Models")
    assert [row["model"] for row in table] == [row.model for row in done.models]
    for shown_row, row in zip(table, done.models, strict=True):
        assert float(shown_row["bits per weight"]) == row.cost.bits_per_weight
        assert float(shown_row["relative error"]) == row.cost.relative_error
        assert (
            shown_row["cosine"] == str(row.measures["cosine"]) if "cosine" in row.measures else not shown_row["cosine"]
        )
    points = [tip.split("\n")[0] for tip in tips(section(page, "Rate and quality"), "dot")]
    assert points == 2 * [row.model for row in done.models[1:]]  # of the error, and of the cosine
    errors = {row["tensor"]: float(row["relative error"]) for row in rows(page, "Tensors")}
    assert errors == {tensor.name: tensor.relative_error for tensor in done.tensors}


def test_a_comparison_of_two_has_no_table_of_models(tmp_path: Path, bert: Path) -> None:
    compress(bert, tmp_path / "four", CompressOptions(Target("bits", 4.0)))
    body = evaluate(bert, tmp_path / "four", EvalData()).to_json()
    (tmp_path / "eval.json").write_text(json.dumps(body))
    report(tmp_path / "eval.json", tmp_path / "page.html")
    page = parse((tmp_path / "page.html").read_text())
    assert sections(page) == ["Tensors that differ"]
    assert facts(page.one("header"))["relative error"] == f"{body['relative_error']:.4f}"
