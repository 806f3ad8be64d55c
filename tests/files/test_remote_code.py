"""The file for users who forget the import: it loads the folder, and goes away with the compression."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.remote_code import SHIM_FILE, forget_shim, is_shim, shim_text, with_shim, without_shim
from tests.support.compressed import compressed_folder

pytest.importorskip("transformers")


def test_code_of_the_model_itself_is_found_through_it() -> None:
    own = {
        "AutoConfig": "configuration_own.Own",
        "AutoModel": "modeling_own.OwnModel",
        "AutoModelForCausalLM": "org/other--modeling_other.Other",
        "AutoTokenizer": ["tokenization_own.Own", None],
    }
    config = {"auto_map": own, "a": 1}
    named = with_shim(config)
    assert is_shim(named["auto_map"])
    assert named["auto_map"]["AutoModel"] == "shim_spectral_surgery.OwnModel__of__modeling_own"
    assert {key: named["auto_map"][key] for key in ("AutoModelForCausalLM", "AutoTokenizer")} == {
        key: own[key] for key in ("AutoModelForCausalLM", "AutoTokenizer")
    }
    assert with_shim(named) == named
    assert without_shim(named) == config
    text = shim_text(named)
    assert text.index("import spectral_surgery") < text.index("from .modeling_own import OwnModel as OwnModel__of__")
    assert "from .configuration_own import Own as" in text
    assert "other" not in text
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "a": 1}
    assert "AutoModel" in with_shim(tokenizer)["auto_map"]
    assert without_shim(with_shim(tokenizer)) == tokenizer
    assert not is_shim(own)
    assert without_shim(with_shim({"a": 1})) == {"a": 1}
    fetched = types.SimpleNamespace(auto_map={"AutoModel": "org/x--shim_spectral_surgery.OwnModel__of__modeling_own"})
    forget_shim(fetched)
    assert fetched.auto_map == {"AutoModel": "org/x--modeling_own.OwnModel"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_decompress_takes_it_away(tmp_path: Path) -> None:
    folder = compressed_folder("llama", tmp_path)
    assert (folder / SHIM_FILE).exists()
    assert is_shim(json.loads((folder / "config.json").read_text())["auto_map"])
    decompress(folder, tmp_path / "plain")
    assert not (tmp_path / "plain" / SHIM_FILE).exists()
    source, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "plain"))
    assert source == plain


@pytest.mark.slow
def test_loads_without_the_import(tmp_path: Path) -> None:
    folder = compressed_folder("llama", tmp_path)
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "assert type(model) is transformers.LlamaForCausalLM\n"
        "from spectral_surgery.hf.quantizer.saving import spectral_layers\n"
        "assert len(list(spectral_layers(model))) == 16\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_of_its_own"
    size: int = 64


class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(96, config.size), nn.Linear(config.size, 96)
        self.post_init()

    def forward(self, input_ids):
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))
"""


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"AutoConfig": "org/own--a.C", "AutoModel": "org/own--a.M", "AutoModelForCausalLM": "x/y--b.M"},
            "org/own, x/y",
        ),
        ({"AutoModel": "a.M", "AutoTokenizer": ["org/own--t.T", None]}, ""),
        ({"AutoConfig": "org/own--a.C"}, ""),
        ({}, ""),
    ],
)
def test_code_of_another_repository_is_said(tmp_path: Path, own: dict[str, object], said: str) -> None:
    source = compressed_folder("llama", tmp_path).parent / "source"
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": own}))
    report = compress(source, tmp_path / "out", CompressOptions(Target("bits", 4.0), min_weights=1000))
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert (tmp_path / "out" / SHIM_FILE).exists() == is_shim(named) == (not said)
    assert bool(report.notes) == bool(said)
    assert all(
        f"({said}): to load the compressed folder, import spectral_surgery first" in note for note in report.notes
    )
    shown = CliRunner().invoke(
        cli, ["compress", str(source), str(tmp_path / "new"), "--bits", "4", "--dry-run", "--json"]
    )
    assert json.loads(shown.stdout)["notes"] == list(report.notes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_with_code_of_its_own_loads_without_the_import(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/modeling_tiny.py").write_text(CODE)
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(tmp_path / 'source')!r})\n"
        "from modeling_tiny import TinyConfig, TinyForCausalLM\n"
        "names = {'AutoConfig': 'modeling_tiny.TinyConfig', 'AutoModelForCausalLM': 'modeling_tiny.TinyForCausalLM'}\n"
        "TinyForCausalLM(TinyConfig(architectures=['TinyForCausalLM'], auto_map=names))"
        f".save_pretrained({str(tmp_path / 'source')!r})\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
    options = CompressOptions(Target("bits", 4.0), min_weights=1000)
    compress(tmp_path / "source", tmp_path / "out", options)
    decompress(tmp_path / "out", tmp_path / "plain")
    source, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "plain"))
    assert source == plain
    assert not (tmp_path / "plain" / SHIM_FILE).exists()
    code = (
        "import torch, transformers\n"
        f"folders = {[str(tmp_path / name) for name in ('out', 'plain')]!r}\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        "ours, plain = (load(folder, trust_remote_code=True) for folder in folders)\n"
        "ids = torch.arange(20)[None]\n"
        "torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)\n"
        "assert type(ours.head).__name__ != 'Linear'\n"
        "assert 'shim' not in str(ours.config.auto_map)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
