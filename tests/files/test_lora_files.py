"""LoRA in PEFT's files: names and shapes of embeddings and convolutions, and back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.lora import LoraConfig
from spectral_surgery.commands.inject import inject as inject_headers
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.peft.adapter_files import CONFIG_FILE, TENSOR_FILE, read_adapter, write_adapter
from spectral_surgery.live.attach import inject, state_of
from spectral_surgery.targets import ModuleTargets
from tests.support.checkpoints import gaussian
from tests.support.peft_lora import answer, build

LLAMA = ("LlamaForCausalLM", {"num_key_value_heads": 2})
GPT2 = ("GPT2LMHeadModel", {"tie_word_embeddings": False, "n_positions": 32})
VIT = ("ViTForImageClassification", {"image_size": 32, "patch_size": 8, "num_labels": 3})
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
Model = tuple[str, dict[str, Any]]


def lora(*targets: str, r: int = 2) -> AdapterSpec:
    return AdapterSpec(METHODS["lora"], LoraConfig(r=r), ModuleTargets(targets))


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        model: nn.Module = PeftModel.from_pretrained(base, folder).eval()
    return model


@pytest.mark.parametrize(
    ("model", "targets", "rank"),
    [
        pytest.param(LLAMA, ("embed_tokens",), 2, id="embedding"),
        pytest.param(LLAMA, ("lm_head", "k_proj"), 40, id="head, and a rank above the sides"),
        pytest.param(VIT, ("projection", "classifier"), 4, id="convolution"),
        pytest.param(GPT2, ("c_attn", "lm_head", "wpe"), 2, id="Conv1D beside Linear"),
    ],
)
def test_our_lora_has_the_same_outputs_in_peft(
    tmp_path: Path, model: Model, targets: tuple[str, ...], rank: int
) -> None:
    inputs = PIXELS if model is VIT else None
    ours = build(model[0], **model[1])
    spec = inject(ours, lora(*targets, r=rank))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    state = state_of(ours, spec)
    write_adapter(state, tmp_path / "a")
    theirs = answer(in_peft(build(model[0], **model[1]), tmp_path / "a"), inputs)
    torch.testing.assert_close(theirs, answer(ours, inputs), rtol=1e-4, atol=1e-4)
    back = read_adapter(tmp_path / "a")
    assert (back.embeddings, back.kernels) == (state.embeddings, state.kernels)
    for layer, tensors in state.layers.items():
        assert all(torch.equal(back.layers[layer][key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(("model", "target"), [(LLAMA, "embed_tokens"), (VIT, "projection")])
def test_an_adapter_from_headers_is_in_place_in_peft(tmp_path: Path, model: Model, target: str) -> None:
    base = build(model[0], **model[1])
    base.save_pretrained(tmp_path / "base")
    inject_headers(tmp_path / "base", tmp_path / "a", lora(target))
    peft = in_peft(base, tmp_path / "a")
    stored = {
        name.replace(".lora_", ".").rpartition("base_model.model.")[2]
        for name in load_file(tmp_path / "a" / TENSOR_FILE)
    }
    assert len(stored) == 2
    there = {name: parameter for name, parameter in peft.named_parameters() if "lora_" in name}
    own = load_file(tmp_path / "a" / TENSOR_FILE)
    assert all(torch.equal(parameter, own[name.replace(".default", "")]) for name, parameter in there.items())


def test_names_and_shapes(tmp_path: Path) -> None:
    layers = {
        "embed": {"A": gaussian(2, 8), "B": gaussian(30, 2)},
        "conv": {"A": gaussian(2, 12), "B": gaussian(5, 2), "magnitude": gaussian(5), "bias": gaussian(5)},
    }
    state = AdapterState(lora("embed", "conv"), layers, embeddings=frozenset({"embed"}), kernels={"conv": (2, 2)})
    write_adapter(state, tmp_path / "a")
    shapes = {
        name.removeprefix("base_model.model."): list(t.shape)
        for name, t in load_file(tmp_path / "a" / TENSOR_FILE).items()
    }
    assert shapes == {
        "embed.lora_embedding_A": [2, 30],
        "embed.lora_embedding_B": [8, 2],
        "conv.lora_A.weight": [2, 3, 2, 2],
        "conv.lora_B.weight": [5, 2, 1, 1],
        "conv.lora_B.bias": [5],
        "conv.lora_magnitude_vector": [1, 5, 1, 1],
    }
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert config["use_dora"] is config["lora_bias"] is True


def test_weights_that_belong_to_no_layer_are_not_taken(tmp_path: Path) -> None:
    write_adapter(AdapterState(lora("q"), {"q": {"A": gaussian(2, 8), "B": gaussian(8, 2)}}), tmp_path / "a")
    file = tmp_path / "a" / TENSOR_FILE
    own = load_file(file)
    save_file(own | {"base_model.model.embed_tokens.weight": torch.ones(3)}, file)  # PEFT stores it when it was resized
    assert list(read_adapter(tmp_path / "a").extra) == ["embed_tokens.weight"]
    save_file(own | {"base_model.model.k.base_layer.weight": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"k\.base_layer\.weight is unexpected"):
        read_adapter(tmp_path / "a")
