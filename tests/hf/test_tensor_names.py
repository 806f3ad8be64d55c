"""Parameters of models are found in checkpoints whose tensors have other names, or are other cuts of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import outline_model
from spectral_surgery.hf.tensor_names import TensorNames, names_in

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, {"tie_word_embeddings": True}),
    "bert": (AutoModelForMaskedLM, {}),
    "mixtral": (AutoModelForCausalLM, EXPERTS),  # stored expert by expert, computed with as one tensor
    "nomic_bert": (AutoModel, {}),  # stored as one matrix, computed with as three
    "vit": (AutoModel, {**VISION, "image_size": 16, "patch_size": 8}),  # renamed
    "dinov2": (AutoModel, {**VISION, "image_size": 16, "patch_size": 8}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


def save(kind: str, folder: Path) -> tuple[Any, TensorNames]:
    auto, settings = CASES[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = auto.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model, names_in(outline_model(folder), read_index(folder))


@pytest.mark.parametrize("kind", CASES)
def test_every_parameter_is_read_as_the_model_has_it(kind: str, tmp_path: Path) -> None:
    model, names = save(kind, tmp_path)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = names.find(name)
        assert found is not None, name
        assert found.shape == tuple(parameter.shape)
        assert torch.equal(found.read(), parameter), name
    assert not names.unclear


def test_the_rows_of_a_fused_tensor_are_told(tmp_path: Path) -> None:
    _, names = save("nomic_bert", tmp_path)
    key = next(name for name in names.parameters if name.endswith("k_proj.weight"))
    found = names.parameters[key]
    assert found.whole is None
    (piece,) = found.pieces
    assert piece.info.shape == (96, 32)
    assert piece.spans == ((0, 32, 32),)


def test_a_model_with_a_head_more_or_less_has_the_same_tensors(tmp_path: Path) -> None:
    save("llama", tmp_path)
    index = read_index(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    names = names_in(base, index)
    stored = names.tensor("layers.0.mlp.up_proj.weight")
    assert stored == index.tensors["model.layers.0.mlp.up_proj.weight"]
    assert names.tensor("model.layers.0.mlp.up_proj.weight") == stored
    assert names_in(outline_model(tmp_path), index).tensor("layers.0.mlp.up_proj.weight") == stored


def test_stored_names_are_found_too_and_others_are_not(tmp_path: Path) -> None:
    _, names = save("vit", tmp_path)
    stored = next(iter(names.index.tensors))
    assert names.find(stored) is not None
    assert names.find("encoder.layer.7.nothing.weight") is None


def test_without_a_model_of_transformers_names_are_those_of_the_files(tmp_path: Path) -> None:
    save("llama", tmp_path)
    index = read_index(tmp_path)
    names = names_in(nn.Linear(2, 2), index)
    assert {name: names.tensor(name) for name in index.tensors} == index.tensors


def test_a_conversion_that_computes_has_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Chunk

    plain = Chunk.convert
    monkeypatch.setattr(
        Chunk, "convert", lambda own, *args, **named: {k: 2 * v for k, v in plain(own, *args, **named).items()}
    )
    _, names = save("nomic_bert", tmp_path)
    assert names.unclear
    assert not any(name.endswith("k_proj.weight") for name in names.parameters)
