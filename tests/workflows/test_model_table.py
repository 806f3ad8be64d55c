"""eval's table of models: baselines are what they are called, at the bytes they are said to have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")

from spectral_surgery.checkpoint.index import read_index
from spectral_surgery.checkpoint.reader import read_tensor
from spectral_surgery.cli import cli
from spectral_surgery.errors import ConfigError
from spectral_surgery.models import compare_logits, load_model
from spectral_surgery.spectra.baselines import BASELINES
from spectral_surgery.workflows.baseline_checkpoint import matrices_of, write_baseline
from spectral_surgery.workflows.evaluate import Beside, EvalData, evaluate
from tests.support.checkpoints import write_folder
from tests.support.compressed import compressed_folder, save_tokenizer

WORDS = " ".join(f"w{3 + (7 * n) % 90}" for n in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    compressed_folder("llama_tied", root)
    for name in ("source", "compressed"):
        save_tokenizer(root / name)
    (root / "text.txt").write_text(WORDS)
    return root


def test_the_table_of_a_model_compressed_and_as_baselines_leave_it(folder: Path) -> None:
    run = CliRunner().invoke
    arguments = [str(folder / "source"), str(folder / "compressed"), "--text", str(folder / "text.txt"), "-q"]
    arguments += ["--seq-length", "12", "--samples", "2", "--baseline", "int8,int4,pruning"]
    done = run(cli, ["eval", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    dense, ours, int8, int4, pruned = body["models"]
    assert dense["bits_per_weight"] == 32
    assert dense["bytes"] == read_index(folder / "source").nbytes
    assert ours["bytes"] == read_index(folder / "compressed").nbytes
    assert ours["bits_per_weight"] == pytest.approx(4, rel=0.05)
    assert pruned["bits_per_weight"] == pytest.approx(ours["bits_per_weight"], rel=0.01)
    assert pruned["bits_per_weight"] <= ours["bits_per_weight"]
    assert dense["relative_error"] == 0 < int8["relative_error"] < ours["relative_error"] < int4["relative_error"]
    assert abs(ours["relative_error"] - body["relative_error"]) < 1e-9
    assert body["measures"]["perplexity_a"] == dense["perplexity"]
    assert body["measures"]["perplexity_b"] == ours["perplexity"]
    assert int8["kl"] < ours["kl"] < pruned["kl"]
    alone = run(cli, ["eval", *arguments[:-2], "--json"])
    assert json.loads(alone.stdout)["measures"] == pytest.approx(body["measures"])
    shown = run(cli, ["eval", *arguments]).stdout
    assert "int4 g128" in shown
    assert "perplexity" in shown.splitlines()[0]


def test_a_baseline_is_judged_by_the_weights_that_it_leaves(folder: Path) -> None:
    data = EvalData(folder / "text.txt", seq_length=12)
    report = evaluate(folder / "source", None, data, beside=Beside(baselines=("nf4",)))
    model, tokenizer = load_model(folder / "source", "AutoModelForCausalLM", dtype=torch.float32)
    before = compare_logits([model], tokenizer, WORDS, 12)
    index = read_index(folder / "source")
    stored = 0
    for name in matrices_of(index, None).shapes:
        result = BASELINES["nf4"].apply(read_tensor(index.tensors[name]), None)
        model.get_parameter(name).data.copy_(result.weight)
        stored += result.stored_bytes
    assert report.models[1].measures["perplexity"] == pytest.approx(
        compare_logits([model], tokenizer, WORDS, 12)["perplexity_a"], rel=1e-6
    )
    assert report.measures == pytest.approx(before, rel=1e-6)
    rest = sum(info.nbytes for name, info in index.tensors.items() if name not in matrices_of(index, None).shapes)
    assert report.models[1].cost.nbytes == rest + stored


def test_experts_are_taken_one_by_one_and_tied_tensors_count_once(tmp_path: Path) -> None:
    experts = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
    table = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    tensors = {
        "mlp.experts.up": experts,
        "model.embed.weight": table,
        "lm_head.weight": table.clone(),
        "norm": torch.ones(8),
    }
    index = read_index(write_folder(tmp_path / "a", tensors))
    matrices = matrices_of(index, None)
    (tmp_path / "b").mkdir()
    cost = write_baseline(index, matrices, BASELINES["prune"], 4.0, tmp_path / "b")
    written = read_index(tmp_path / "b")
    each = [BASELINES["prune"].apply(expert, 4.0) for expert in experts]
    assert torch.equal(read_tensor(written.tensors["mlp.experts.up"]), torch.stack([own.weight for own in each]))
    once = BASELINES["prune"].apply(table, 4.0)
    for name in ("model.embed.weight", "lm_head.weight"):
        assert torch.equal(read_tensor(written.tensors[name]), once.weight)
    stored = sum(own.stored_bytes for own in each) + once.stored_bytes
    assert cost.nbytes == stored + 8 * 4
    assert cost.bits_per_weight == pytest.approx(8 * stored / (experts.numel() + table.numel()))
    lost = (experts - torch.stack([own.weight for own in each])).square().sum() + (table - once.weight).square().sum()
    assert cost.relative_error == pytest.approx(float(lost / (experts.square().sum() + table.square().sum())) ** 0.5)


def test_what_no_table_can_be_made_of(folder: Path) -> None:
    a, b = folder / "source", folder / "compressed"
    with pytest.raises(ConfigError, match=r"eval --baseline prune: no rate to meet; a compressed B or --bits"):
        evaluate(a, None, EvalData(), beside=Beside(baselines=("prune",)))
    with pytest.raises(ConfigError, match=r"eval --baseline: compressed is compressed; a plain A is accepted"):
        evaluate(b, None, EvalData(), beside=Beside(baselines=("int8",)))
    with pytest.raises(ConfigError, match=r"eval --adapter: beside baselines or several B"):
        evaluate(a, b, EvalData(), beside=Beside(others=(b,)), adapter=folder)
    with pytest.raises(ConfigError, match=r"baseline 'int5': unknown"):
        evaluate(a, None, EvalData(), beside=Beside(baselines=("int5",)))
    with pytest.raises(ConfigError, match=r"embed_tokens.weight: prune: 0.5 bits per weight cannot hold"):
        evaluate(a, None, EvalData(), beside=Beside(baselines=("prune",), bits=0.5))
    table = evaluate(a, None, EvalData(), beside=Beside(baselines=("prune", "svd"), bits=6.0)).models
    assert [row.model for row in table] == ["source", "magnitude pruning, 6 bits", "truncated SVD, 6 bits"]
    assert evaluate(a, b, EvalData(), beside=Beside(others=(b,))).models[2].cost.nbytes == read_index(b).nbytes
