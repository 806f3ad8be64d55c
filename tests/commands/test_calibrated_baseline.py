"""eval reference GPTQ, Wanda and SparseGPT: calibrated on the same text, block by block, its bytes counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from spectral_surgery.baselines import BASELINES
from spectral_surgery.cli import cli
from spectral_surgery.commands.eval import evaluate
from spectral_surgery.commands.eval.baselines import calibrated_weights
from spectral_surgery.commands.settings import Reference
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.text.settings import EvalData, TextData
from tests.commands.test_calibrate import KINDS, save_model
from tests.commands.test_train import WORDS


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rows = torch.randint(0, 10, (80, 6), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in rows))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_blocks_are_quantised_as_they_are_stored(tmp_path: Path, kind: str, text: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    index = read_index(source)
    wide = {name: info for name, info in index.tensors.items() if len(info.shape) == 2}
    found = calibrated_weights(source, index, wide, TextData(text, 32, 16), BASELINES["gptq4"])
    assert len(found) == {"llama": 14, "bert": 12, "gpt2": 8}[kind]
    for name, made in found.items():
        original = read_tensor(index.tensors[name]).float()
        assert made.weight.shape == original.shape
        assert 0 < float((made.weight - original).norm() / original.norm()) < 0.3
        assert 4 < 8 * made.stored_bytes / original.numel() < 4.5
        rows = made.weight.T if kind == "gpt2" else made.weight
        assert len(rows[0, :128].unique()) <= 16  # the levels of a group


def test_the_table_has_gptq_beside_round_to_nearest(tmp_path: Path, text: Path) -> None:
    source = save_model("bert", tmp_path / "model")
    data, text_to_calibrate = EvalData(text=text), TextData(text, 64, 16)
    report = evaluate(source, None, data, reference=Reference((), ("gptq3", "int3"), None, text_to_calibrate))
    rows = {row.model: row for row in report.models}
    own, nearest = rows["GPTQ int3 g128"], rows["int3 g128"]
    assert own.cost.bits_per_weight == pytest.approx(nearest.cost.bits_per_weight, rel=0.01)
    assert own.cost.relative_error > nearest.cost.relative_error  # of weights; what counts is outputs
    assert own.measures["cosine"] > 0.9


def test_pruning_with_inputs_is_better_than_without_at_the_same_bytes(tmp_path: Path, text: Path) -> None:
    source = save_model("bert", tmp_path / "model")
    reference = Reference((), ("sparsegpt", "prune", "wanda"), 6.0, TextData(text, 64, 16))
    report = evaluate(source, None, EvalData(text=text), reference=reference)
    _, surgery, magnitude, wanda = report.models
    assert surgery.cost.nbytes == magnitude.cost.nbytes == wanda.cost.nbytes
    assert surgery.measures["cosine"] > magnitude.measures["cosine"]
    assert surgery.cost.relative_error > wanda.cost.relative_error > magnitude.cost.relative_error


@pytest.mark.parametrize("name", ["gptq4", "wanda", "sparsegpt", "all"])
def test_without_text_it_is_refused(tmp_path: Path, text: Path, name: str) -> None:
    source = save_model("bert", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"eval --baseline \w+: expected text to calibrate on, got none. Use --calib"):
        evaluate(source, None, EvalData(text=text), reference=Reference((), (name,), 4.0))


def test_a_rate_that_is_too_low_is_refused_by_the_name_of_the_tensor(tmp_path: Path, text: Path) -> None:
    source = save_model("bert", tmp_path / "model")
    reference = Reference((), ("wanda",), 1.0, TextData(text, 8, 16))
    with pytest.raises(ConfigError, match=r"encoder\.layer\.0\.attention\.self\.query\.w.*got 1"):
        evaluate(source, None, EvalData(), reference=reference)


def test_the_number_of_sequences_is_that_of_the_option(tmp_path: Path, text: Path) -> None:
    source = save_model("bert", tmp_path / "model")
    arguments = ["--baseline", "sparsegpt", "--bits", "6", "--calibrate", str(text), "--calibrate-samples", "4", "-q"]
    done = CliRunner().invoke(cli, ["eval", str(source), *arguments, "--json"])
    assert done.exit_code == 0, done.output
    errors = [json.loads(done.stdout)["models"][1]["relative_error"]]
    for samples in (4, 80):
        reference = Reference((), ("sparsegpt",), 6.0, TextData(text, samples))
        errors.append(evaluate(source, None, EvalData(), reference=reference).models[1].cost.relative_error)
    assert errors[0] == errors[1] != errors[2]
