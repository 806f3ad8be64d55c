"""Checkpoints that another tool has quantised, through the commands: they are what they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_surgery.cli import cli
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.inspect import inspect
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import load_any, load_outline
from tests.support.compressed import save_tokenizer
from tests.support.quantised import FP8_SETTINGS, fp8, quantise_fp8, write

IDS = torch.arange(5, 21)[None]
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama(folder: Path, **sizes: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in FP8 blocks, as transformers loads it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fp8")
    made = quantise_fp8(llama(folder / "dense"), folder / "fp8")
    save_tokenizer(made)
    return made


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits.float()
    return found


def test_fp8_becomes_an_ordinary_compressed_folder(published: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    stands_for = {name: read_tensor(info) for name, info in read_index(published).tensors.items()}
    same = tmp_path / "same"
    same.mkdir()
    save_file(stands_for, same / "model.safetensors", {"format": "pt"})
    config = json.loads((published / "config.json").read_text())
    del config["quantization_config"]
    (same / "config.json").write_text(json.dumps(config))
    options = CompressOptions(Target("bits", 4.0), min_weights=512)
    report = compress(published, tmp_path / "out", options)
    of_dense = compress(same, tmp_path / "out-of-dense", options)
    assert report.manifest.report == of_dense.manifest.report  # bit for bit, so the same error
    assert report.input_bytes == (published / "model.safetensors").stat().st_size - _header(published)
    decompress(tmp_path / "out", tmp_path / "plain", verify=True)
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert written.keys() == stands_for.keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for folder in (tmp_path / "out", tmp_path / "plain"):
        settings = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
        assert settings.get("quant_method") in (None, "spectral_surgery")
    theirs = AutoModelForCausalLM.from_pretrained(
        published, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    dense = logits(AutoModelForCausalLM.from_pretrained(same, dtype=torch.float32))
    cost = (ours - dense).norm()
    assert 0 < (ours - logits(theirs)).norm() <= 1.02 * cost  # theirs has weights in float32, not rounded to bfloat16


def _header(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def test_models_are_built_of_what_they_stand_for_with_ragged_blocks_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    llama(tmp_path / "dense", hidden_size=192, intermediate_size=200)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    for name in weights:
        if "up_proj" in name:
            weights[name][:128] *= 8  # a whole block of rows; the others are cut off
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    folder = quantise_fp8(tmp_path / "dense", tmp_path / "fp8")
    save_tokenizer(folder)
    model = load_any(folder, dtype=torch.float32)
    stands_for = read_index(folder).tensors
    assert all(torch.equal(model.state_dict()[n], read_tensor(i).float()) for n, i in stands_for.items())
    dense = logits(load_any(tmp_path / "dense", dtype=torch.float32))
    assert (logits(model) - dense).norm() < 0.1 * dense.norm()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # it takes 192 rows for two blocks of 96
    assert (logits(theirs) - dense).norm() > 2 * (logits(model) - dense).norm()  # else ours has no reason
    outline = load_outline(folder, "AutoModelForCausalLM")
    assert {name: p.shape for name, p in outline.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_mxfp4_experts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_local_experts": 4}
    dense = GptOssForCausalLM(GptOssConfig(**sizes, num_experts_per_tok=2)).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    tensors = {}
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        if name.endswith("_proj") and tensor.ndim == 3:
            experts, inputs, outputs = tensor.shape
            grid = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 121, grid, dtype=torch.uint8)
        else:
            tensors[name] = tensor
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    source = write(tmp_path / "mxfp4", tensors, {"quant_method": "mxfp4"}, config)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours = load_any(source, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))
    options = CompressOptions(Target("bits", 6.0), min_weights=512)
    report = compress(source, tmp_path / "out", options)
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.manifest.tensors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    decompress(tmp_path / "out", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert (logits(loaded) - logits(plain)).norm() < 1e-2 * logits(plain).norm()


def test_inspect_and_compress_agree(published: Path) -> None:
    found = inspect(published, spectrum=True, include=("*up_proj*",))
    assert found.kind == "dense"
    assert len(found.spectra) == 2
    assert any("fp8" in note for note in found.notes)


def test_faults_are_one_line_and_publish_nothing(tmp_path: Path) -> None:
    from click.testing import CliRunner

    name = "model.layers.0.mlp.up_proj.weight"
    values, scales = fp8(torch.randn(256, 256), (128, 128))
    nan = scales.clone()
    nan[1, 1] = float("nan")
    cases = {
        "has no scales; expected": ({name: values}, FP8_SETTINGS),
        "has the shape [2, 1]": ({name: values, f"{name}_scale_inv": scales[:, :1]}, FP8_SETTINGS),
        "has NaN or infinite scales": ({name: values, f"{name}_scale_inv": nan}, FP8_SETTINGS),
        "quantised already (hqq)": ({name: scales}, {"quant_method": "hqq"}),
        "quantised already (made_up)": ({name: scales}, {"quant_method": "made_up"}),
    }
    for number, (message, (tensors, settings)) in enumerate(cases.items()):
        source = write(tmp_path / f"source-{number}", tensors, settings)
        result = CliRunner().invoke(cli, ["compress", str(source), str(tmp_path / "out"), "--bits", "4", "-q"])
        assert result.exit_code == 1
        assert isinstance(result.exception, CheckpointError)
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)
        assert not (tmp_path / "out").exists()
