"""GGUF files give the parameters that transformers makes of them, any rows alone, and compress like any checkpoint."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_flat, read_tensor
from spectral_surgery.hf.gguf_source import find_gguf
from tests.support.gguf_files import HIDDEN, write_gguf

pytest.importorskip("gguf")
transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "Q8_0"),
        ("llama", "Q4_0"),
        ("llama", "F16"),
        ("qwen2", "Q5_0"),
        ("gemma2", "Q8_0"),
        ("qwen3moe", "Q8_0"),
    ],
)
def test_as_transformers_reads_it(architecture: str, kind: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", architecture, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    expected = theirs.state_dict()
    (tmp_path / "made").mkdir()
    index = read_index(find_gguf(file, tmp_path / "made"))
    tied = set() if "lm_head.weight" in index.tensors else {"lm_head.weight"}
    assert sorted(index.tensors) == sorted(expected.keys() - tied)
    assert index.config["model_type"] == theirs.config.model_type
    for name, info in pickle.loads(pickle.dumps(index.tensors)).items():
        found = read_tensor(info)
        assert found.dtype == {"F16": torch.float16}.get(kind, torch.bfloat16) if found.ndim > 1 else torch.float32
        assert torch.equal(found.float(), expected[name].to(found.dtype).float()), name
        width = found.shape[-1] if found.ndim > 1 else 1
        rows = found.numel() // width
        part = read_flat(info, rows // 3 * width, (rows - 1) * width)
        assert torch.equal(part, found.reshape(-1)[rows // 3 * width : (rows - 1) * width]), name


def test_compressed_with_a_tokenizer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", "llama", tokenizer=True)
    (tmp_path / "made").mkdir()
    found = find_gguf(file, tmp_path / "made")
    report = compress(found, tmp_path / "out", CompressOptions(Target("bits", 5.0), min_weights=512))
    assert report.input_bytes < file.stat().st_size
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == HIDDEN
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        ours, dense = model(ids).logits, theirs(ids).logits
    assert (ours - dense).norm() < 0.2 * dense.norm()


def test_a_tokenizer_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", "llama")
    (tmp_path / "made").mkdir()
    (note,) = read_index(find_gguf(file, tmp_path / "made")).notes
    assert note.startswith("The result has no tokenizer: transformers cannot make one of the GGUF file (")
    assert "\n" not in note


def test_damaged_files(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "model.gguf", "llama").read_bytes()
    broken = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", whole[:300], whole[: len(whole) // 2], b"no GGUF at all", whole[:4] + b"\xff" * 400):
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"broken\.gguf: expected .*, got .*\. \w") as caught:
            find_gguf(broken, tmp_path)
        assert "\n" not in str(caught.value)


def test_architectures_without_a_table(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", "rwkv7")
    with pytest.raises(CheckpointError, match="rwkv7") as caught:
        find_gguf(file, tmp_path)
    assert "\n" not in str(caught.value)
