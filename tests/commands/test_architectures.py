"""Real model families, tiny and random: what transformers saves is compressed, decompressed and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed.settings import CompressOptions

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 136,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("AutoModelForMaskedLM", TEXT),
    "llama": ("AutoModelForCausalLM", TEXT | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": ("AutoModelForCausalLM", {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "t5": ("AutoModelForSeq2SeqLM", {"vocab_size": 320, "d_model": 64, "d_ff": 136, "num_layers": 2, "num_heads": 4}),
    "vit": ("AutoModelForImageClassification", TEXT | {"image_size": 32, "patch_size": 8}),
    "qwen3_moe": (
        "AutoModelForCausalLM",
        TEXT | {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 72, "num_experts_per_tok": 2},
    ),
}


def output(model: Any) -> torch.Tensor:
    tokens = torch.arange(24).reshape(2, 12)
    inputs: dict[str, torch.Tensor] = {"input_ids": tokens}
    if model.config.model_type == "vit":
        inputs = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs).logits
    return logits.float()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_family_round_trip(tmp_path: Path, family: str) -> None:
    auto, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = getattr(transformers, auto).from_config(config).eval()
    model.save_pretrained(tmp_path / "source")
    report = compress(
        tmp_path / "source", tmp_path / "out", CompressOptions(Target("max_error", 0.02), min_weights=1000)
    )
    assert report is not None
    assert report.manifest.report.relative_error <= 0.02
    assert report.manifest.report.weights > 0.9 * sum(p.numel() for p in model.parameters() if p.ndim > 1) - 1000
    assert decompress(tmp_path / "out", tmp_path / "plain", verify=True).failures == ()
    back, loading = getattr(transformers, auto).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    before, after = output(model), output(back.eval())
    assert 0 < float((after - before).norm() / before.norm()) < 0.15
