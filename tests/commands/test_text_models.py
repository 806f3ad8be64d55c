"""Commands that run models on text: those that see beside, those with code of their own, those that take no text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.command import run
from tests.support.tiny import save_tokenizer

pytest.importorskip("transformers")

import transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TEXT: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TOKENS = {"image_token_id": 30, "video_token_id": 29, "vision_start_token_id": 28, "vision_end_token_id": 27}
CALIBRATE = (
    "--bits",
    "3",
    "--samples",
    "8",
    "--seq-length",
    "16",
    "--min-weights",
    "512",
    "-q",
    "--json",
    "--calibrate",
)
HEAL = ("--sparsity", "0.3", "--steps", "2", "--seq-length", "16", "--min-weights", "512", "-q", "--json", "--heal")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-VL, with larger eyes than words."""
    folder = tmp_path_factory.mktemp("seeing")
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": ROPE},
        vision_config={"depth": 3, "hidden_size": 64, "num_heads": 4, "patch_size": 4, "intermediate_size": 128,
                       "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_model_that_sees_is_calibrated_judged_and_run_on_text(tmp_path: Path, seeing: Path, text: Path) -> None:
    made = run("compress", seeing, tmp_path / "out", *CALIBRATE, text)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)["calibration"]
    assert told["matrices"] == 15  # the output layer with them
    assert not told["as_a_whole"]
    left = {own["name"]: own["reason"] for own in told["not_calibrated"]}
    assert left["model.visual.blocks.0.mlp.linear_fc1.weight"] == "outside of the list of blocks"
    judged = run(
        "eval", seeing, tmp_path / "out", "--text", text, "--samples", "2", "--seq-length", "16", "-q", "--json"
    )
    assert judged.returncode == 0, judged.stderr
    assert 0 < json.loads(judged.stdout)["measures"]["kl"] < 0.1
    for folder in (seeing, tmp_path / "out"):
        said = run("generate", folder, "red green", "--max-tokens", "2", "--json")
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["tokens"] >= 1


def test_what_text_does_not_reach_is_not_healed_and_named(tmp_path: Path, seeing: Path, text: Path) -> None:
    made = run("compress", seeing, tmp_path / "sparse", *HEAL[:2], "--min-weights", "512", "-q")
    assert made.returncode == 0, made.stderr
    healed = run("heal", tmp_path / "sparse", seeing, tmp_path / "out", "--data", text, "--steps", "2", "-q", "--json")
    assert healed.returncode == 0, healed.stderr
    untrained = json.loads(healed.stdout)["untrained"]
    assert untrained
    assert all(name.startswith("model.visual.") for name in untrained)


def test_models_that_take_no_text_alone_say_why(tmp_path: Path, text: Path) -> None:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    transformers.BrosModel(transformers.BrosConfig(**sizes)).save_pretrained(tmp_path / "bros")
    save_tokenizer(tmp_path / "bros")
    for options in (CALIBRATE, HEAL):
        made = run("compress", tmp_path / "bros", tmp_path / "out", *options, text, "--overwrite")
        assert made.returncode == 1
        assert "got ValueError: You have to specify bbox" in made.stderr
        assert made.stderr.count("\n") == 1


MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast


class OwnConfig(PreTrainedConfig):
    model_type = "own_of_test"

    def __init__(self, vocab_size=32, hidden_size=32, num_hidden_layers=1, **more):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**more)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.inner = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, return_dict=True, **more):
        x = torch.relu(self.inner(self.embed(input_ids)))
        return BaseModelOutput(last_hidden_state=x) if return_dict else (x,)


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed

    def forward(self, input_ids, attention_mask=None, **more):
        return CausalLMOutputWithPast(logits=self.head(self.model(input_ids).last_hidden_state))
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose code is in its folder."""
    import transformers.dynamic_module_utils as dynamic

    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own_of_test.py").write_text(MODELING)
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # a test before this one may have used another cache, where Python would look for this one's modules
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").is_dir()])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # it was found in another folder
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import modeling_own_of_test as code  # it was written above

    names = {"AutoConfig": "OwnConfig", "AutoModel": "OwnModel", "AutoModelForCausalLM": "OwnForCausalLM"}
    auto_map = {auto: f"modeling_own_of_test.{name}" for auto, name in names.items()}
    torch.manual_seed(0)
    code.OwnForCausalLM(code.OwnConfig(architectures=["OwnForCausalLM"], auto_map=auto_map)).save_pretrained(folder)
    save_tokenizer(folder)
    monkeypatch.delitem(sys.modules, "modeling_own_of_test")
    return folder


def test_code_of_a_model_runs_when_it_is_trusted(tmp_path: Path, own_code: Path, text: Path) -> None:
    made = run("compress", own_code, tmp_path / "out", "--bits", "4", "--min-weights", "512", "-q")
    assert made.returncode == 0, made.stderr
    more = ("--samples", "2", "--seq-length", "16", "-q")
    commands = (
        ("compress", own_code, tmp_path / "calibrated", *CALIBRATE, text),
        ("compress", own_code, tmp_path / "important", *HEAL, text, "--keep", "important"),
        ("heal", tmp_path / "out", own_code, tmp_path / "healed", "--data", text, "--steps", "1", "-q"),
        ("eval", own_code, tmp_path / "out", "--text", text, *more),
        ("generate", tmp_path / "out", "red green", "--max-tokens", "2"),
        ("generate", own_code, "red green", "--max-tokens", "2"),
    )
    for command in commands:
        refused = run(*command)
        assert refused.returncode == 1, command
        assert "expected a model that transformers knows, got one that brings code" in refused.stderr
        assert "--trust-remote-code" in refused.stderr
        assert refused.stderr.count("\n") == 1
        done = run(*command, "--trust-remote-code")
        assert done.returncode == 0, done.stderr
