"""eval: distances are right for plain and compressed checkpoints, and models are judged on text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from spectral_surgery import CompressOptions, Target
from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.lora import LoraConfig
from spectral_surgery.cli import cli
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.eval import evaluate
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.peft.adapter_files import write_adapter
from spectral_surgery.targets import ModuleTargets
from spectral_surgery.text.scores import compare_logits
from spectral_surgery.text.settings import EvalData
from tests.commands.test_merge import DOWN, Q, adapter
from tests.support.checkpoints import gaussian, llama_like, write_folder


def test_distances_between_checkpoints(tmp_path: Path) -> None:
    tensors = llama_like(torch.float32)
    a = write_folder(tmp_path / "a", tensors)
    changed = dict(tensors) | {f"{Q}.weight": tensors[f"{Q}.weight"] * 1.5, "new": torch.ones(3)}
    report = evaluate(a, write_folder(tmp_path / "b", changed, shards=2), EvalData())
    assert [tensor.name for tensor in report.tensors] == [f"{Q}.weight"]
    assert report.tensors[0].relative_error == pytest.approx(0.5)
    assert report.relative_error == pytest.approx(0.5)
    assert report.equal == len(tensors) - 1
    assert report.only_in_one == ("new",)


def test_a_compressed_checkpoint_is_as_far_as_its_report_says(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", llama_like(torch.float32))
    said = compress(a, tmp_path / "c", CompressOptions(Target("bits", 3.0))).to_json()
    report = evaluate(a, tmp_path / "c", EvalData())
    assert report.relative_error == pytest.approx(said["relative_error"], rel=5e-3)
    decompress(tmp_path / "c", tmp_path / "d")
    assert evaluate(tmp_path / "c", tmp_path / "d", EvalData()).relative_error < 1e-6


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", {"w": gaussian(4, 4)})
    with pytest.raises(CheckpointError, match="got no tensor of the same name"):
        evaluate(a, write_folder(tmp_path / "b", {"v": gaussian(4, 4)}), EvalData())
    with pytest.raises(CheckpointError, match=r"w: expected equal shapes, got \[4, 4\] in .* and \[4, 5\] in"):
        evaluate(a, write_folder(tmp_path / "c", {"w": gaussian(4, 5)}), EvalData())
    with pytest.raises(ConfigError, match="eval: expected a second model, --text, --sts or --baseline, got one model"):
        evaluate(a, None, EvalData())


def test_the_command_and_its_exit_code(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", llama_like(torch.float32))
    merged = tmp_path / "m"
    own = adapter(tmp_path / "adapter")
    run = CliRunner().invoke
    assert run(cli, ["merge", str(a), str(own), str(merged), "-q"]).exit_code == 0
    done = run(cli, ["eval", str(a), str(merged), "-q"])
    assert "2 tensors differ" in done.stdout
    body = json.loads(run(cli, ["eval", str(a), str(merged), "-q", "--json"]).stdout)
    assert {tensor["name"] for tensor in body["tensors"]} == {f"{Q}.weight", f"{DOWN}.weight"}
    assert run(cli, ["eval", str(a), str(merged), "-q", "--max-error", "1e-9"]).exit_code == 3
    assert run(cli, ["eval", str(a), str(a), "-q", "--max-error", "1e-9"]).exit_code == 0


class Fixed(torch.nn.Module):
    """A language model whose logits do not depend on the text."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, ids: torch.Tensor) -> object:
        class Output:
            logits = self.logits.expand(*ids.shape, -1)

        return Output


def test_perplexity_and_divergence_are_those_of_the_definition() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.2, 0.6])
    models = [Fixed(p.log().tolist()), Fixed(q.log().tolist())]
    found = compare_logits(models, lambda text, **_: {"input_ids": [int(c) for c in text]}, "0120120", 3)
    tokens = [1, 2, 1, 2]  # sequences 012 012; the first token of each is not predicted
    assert found["perplexity_a"] == pytest.approx(math.exp(-sum(math.log(p[t]) for t in tokens) / 4), rel=1e-5)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert found["same_top"] == 0
    with pytest.raises(ConfigError, match="eval --text: expected two or more tokens"):
        compare_logits(models, lambda *_, **__: {"input_ids": [1]}, "1", 3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    from tests.commands.test_train import save_tokenizer

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=12, pad_token_id=0, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_encoders_are_judged_with_and_without_an_adapter(tmp_path: Path, encoder: Path) -> None:
    sts, text = tmp_path / "sts.csv", tmp_path / "text.txt"
    sts.write_text("red cat,red dog,3\nsun,moon,1.5\none two,two,2.5\nblue,blue,5\n")
    text.write_text("red cat\n\nsun moon\n")
    layer = "encoder.layer.0.attention.self.query"
    spec = AdapterSpec(METHODS["lora"], LoraConfig(r=2), ModuleTargets(("query",)))
    tensors = {"A": gaussian(2, 16), "B": 200 * gaussian(16, 2)}
    write_adapter(AdapterState(spec, {layer: tensors}), tmp_path / "own")
    measures = evaluate(encoder, None, EvalData(text, sts), adapter=tmp_path / "own").measures
    assert set(measures) == {"cosine", "spearman_a", "spearman_b"}
    assert 0 < measures["cosine"] < 1
    same = evaluate(encoder, encoder, EvalData(text, sts)).measures
    assert same["cosine"] == pytest.approx(1)
    assert same["spearman_a"] == same["spearman_b"]
    with pytest.raises(ConfigError, match="expected two sentence encoders to compare, got one"):
        evaluate(encoder, None, EvalData(text))
    sts.write_text("red,3\n")
    with pytest.raises(ConfigError, match="expected rows of two sentences and a score"):
        evaluate(encoder, None, EvalData(sts=sts))
