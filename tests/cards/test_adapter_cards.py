"""Cards of adapters: how they were made, what was measured, in words that can be typed again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.from_update.fit_update import Size
from spectral_surgery.adapters.lora import LoraConfig
from spectral_surgery.cards.check import check_folder
from spectral_surgery.cards.command_line import setting_options, train_command
from spectral_surgery.cli import export as export_cli
from spectral_surgery.cli import extract as extract_cli
from spectral_surgery.cli import train as train_cli
from spectral_surgery.commands.export import export
from spectral_surgery.commands.extract import ExtractOptions, extract
from spectral_surgery.commands.inject import inject
from spectral_surgery.commands.push import card_text
from spectral_surgery.options import parse_settings
from spectral_surgery.targets import ModuleTargets
from spectral_surgery.training.settings import TrainSettings
from tests.hub_server.metadata import problems
from tests.support.checkpoints import gaussian, llama_like, write_folder

Q = "model.layers.0.self_attn.q_proj"
METRICS = {
    "task": "causal-lm",
    "decided_by": "loss",
    "before": {"loss": 3.5, "perplexity": 33.1, "epoch": 0},
    "after": {"loss": 2.25, "perplexity": 9.49, "epoch": 2},
    "best_step": 6,
    "steps": 8,
    "examples": {"train": 90, "held_out": 10},
    "train_loss": [[1, 3.6], [8, 2.1]],
}
COMMAND = train_command(
    AdapterSpec(METHODS["lora"], LoraConfig(r=2, lora_alpha=3.0), ModuleTargets((Q,))),
    "causal-lm",
    TrainSettings(0.02, 0.001, steps=8, bf16=True),
    {"columns": ["text"], "seq_length": 64, "eval_fraction": 0.1},
)


def typed(card: str, command: click.Command) -> dict[str, Any]:
    """The command of a card, as the command line reads it."""
    words = shlex.split(card.split("```bash\n")[1].split("\n```", maxsplit=1)[0])
    assert words[:2] == ["spectral-surgery", command.name]
    return command.make_context(str(command.name), words[2:]).params


def lora(base: Path, folder: Path) -> Path:
    """An adapter that changes something."""
    config = LoraConfig(r=2, lora_alpha=3.0)
    inject(base, folder, AdapterSpec(METHODS["lora"], config, ModuleTargets((Q,)), "org/base"))
    file = folder / "adapter_model.safetensors"
    save_file({name: gaussian(*tensor.shape) for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base", llama_like(torch.float32))


def card_of(folder: Path, name: str = "me/adapter") -> str:
    card = card_text(folder, check_folder(folder), name)
    assert list(problems(card)) == []
    assert "THIS_FOLDER" not in card
    assert str(folder.parent) not in card
    return card


def test_a_trained_adapter_shows_what_was_measured(base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "adapter")
    (folder / "metrics.json").write_text(json.dumps(METRICS | {"command": COMMAND}))
    card = card_of(folder)
    for line in (
        "| held out | before | after |",
        "| loss | 3.5 | 2.25 |",
        "| perplexity | 33.1 | 9.49 |",
        "- trained on: 90 examples, 8 steps; judged on 10 others",
        "- kept: the adapter of step 6, which has the best loss",
        "- training loss: 3.6 at first, 2.1 at last",
    ):
        assert f"{line}\n" in card
    assert "epoch" not in card
    params = typed(card, train_cli.command)
    assert (params["base"], params["method"], params["target_modules"]) == ("org/base", "lora", (Q,))
    assert params["settings"] == ("r=2", "lora_alpha=3.0")
    for words in ("--learning-rate 0.02", "--steps 8", "--bf16", "--columns text", "--seq-length 64", "--task causal"):
        assert words in card
    assert "--batch-size" not in card  # at its default
    (folder / "README.md").write_text(card.replace("| loss |", "| lost |") + "\nMine\n")
    again = card_of(folder)
    assert "| loss | 3.5 |" in again  # from the file of metrics, not from the card
    assert again.endswith("\nMine\n")


@pytest.mark.parametrize(
    "change", [{"after": None}, {"after": {"loss": "low"}}, {"train_loss": [["x"]], "examples": 3, "command": "x"}]
)
def test_metrics_that_were_tampered_with_do_no_harm(base: Path, tmp_path: Path, change: dict[str, object]) -> None:
    folder = lora(base, tmp_path / "adapter")
    (folder / "metrics.json").write_text(json.dumps(METRICS | change))
    card = card_of(folder)
    assert ("| tensor | shape | bytes |" in card) == ("after" in change)
    assert "```bash" not in card


def test_an_adapter_without_its_command_has_a_card(base: Path, tmp_path: Path) -> None:
    folder = lora(base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    card = card_of(folder)
    assert "```bash" not in card
    assert "| loss | 3.5 | 2.25 |" in card


def test_weight_differences_say_how_to_use_them(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "delta"
    report = export(lora(base, tmp_path / "a"), out, "delta", base=base, dtype="BF16", origin=str(base))
    card = card_of(out, "me/delta")
    params = typed(card, export_cli.command)
    assert (params["to"], params["base"], params["dtype"]) == ("delta", "org/base", "bfloat16")
    assert "base_model: org/base\n" in card
    assert "base_model_relation: adapter\n" in card
    assert f"| `{Q}` | 130 x 96 | {130 * 96 * 2} | {report.relative_error:.4g} |\n" in card
    assert f"- relative error: {report.relative_error:.4g}, of all" in card
    assert f"1, {130 * 96:,} numbers, {130 * 96 * 2:,} bytes, BF16\n" in card
    assert 'resolve("me/delta")' in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    edited = card.replace("\n# ", "\n# ", 1) + "\n## Mine\n"
    (out / "README.md").write_text(edited)
    assert card_of(out, "me/delta") == edited


def test_what_was_extracted_and_exported_keeps_its_measures(base: Path, tmp_path: Path) -> None:
    tuned = {name: tensor + gaussian(*tensor.shape, seed=9) for name, tensor in llama_like(torch.float32).items()}
    targets = ModuleTargets((Q,))
    options = ExtractOptions("lora", Size("count", 4), targets=targets, base_model="org/base", max_count=9)
    found = extract(base, write_folder(tmp_path / "tuned", tuned), tmp_path / "extract", options)
    card = card_of(tmp_path / "extract")
    params = typed(card, extract_cli.command)
    assert (params["base"], params["rank"], params["max_rank"], params["target_modules"]) == ("org/base", 4, 9, (Q,))
    assert f"| `{Q}` | 130 x 96 | 4 | " in card
    assert f"| {found.relative_error:.4g} |\n" in card
    assert "Made from the difference of two checkpoints, not trained." in card
    done = export(tmp_path / "extract", tmp_path / "export", "spectral_delta", size=Size("max_error", 0.5))
    card = card_of(tmp_path / "export", "me/export")
    assert typed(card, export_cli.command)["max_error"] == 0.5
    assert f"| {done.layers[0].relative_error:.4g} |\n" in card
    assert "an adapter of the method lora, not trained." in card
    assert '"me/export")' in card


@pytest.mark.parametrize("method", METHODS)
def test_settings_can_be_typed_again(method: str) -> None:
    kind = METHODS[method].config
    assert setting_options(kind()) == []
    name = next(name for name in ("r", "n_frequency") if hasattr(kind(), name))
    config = kind(**{name: 7})
    assert parse_settings(kind, setting_options(config)) == config
