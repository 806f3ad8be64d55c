"""modules_to_save on compressed models: what is trained is a dense copy, through PEFT and through inject alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.merge import merge
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.peft.adapter_files import read_adapter, write_adapter
from spectral_surgery.hf.quantizer.saving import spectral_layers
from spectral_surgery.live import attach
from spectral_surgery.live.compression import compress_model
from spectral_surgery.live.trained_copy import trained_copy
from spectral_surgery.targets import ModuleTargets
from tests.support.compressed import compressed_folder, dense_model, output

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Input and output embeddings:UserWarning")

IDS = torch.arange(3, 27).reshape(2, 12)
SAID = pytest.mark.filterwarnings("ignore:modules_to_save. a module:UserWarning")
# family, layer of the adapter, what is trained whole, and the trained tensors of one of these
CASES = [
    ("llama", "q_proj", "lm_head", {"weight"}),
    ("llama", "q_proj", "embed_tokens", {"weight"}),
    ("llama_tied", "q_proj", "lm_head", {"weight"}),
    ("llama_tied", "q_proj", "embed_tokens", {"weight"}),
    ("llama", "q_proj", "mlp", {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}),
    ("gpt2", "c_attn", "mlp", {"c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"}),
    ("qwen3_moe", "q_proj", "mlp", {"experts.gate_up_proj", "experts.down_proj", "gate.weight"}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compressed")
    found = {family: compressed_folder(family, root / family) for family in {case[0] for case in CASES}}
    for folder in found.values():
        decompress(folder, folder.parent / "plain")
    return found


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def train(model: Any) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


@SAID
@pytest.mark.parametrize(("family", "layer", "saved", "tensors"), CASES)
def test_peft_trains_saves_loads_and_merges_a_dense_copy(
    folders: dict[str, Path], tmp_path: Path, family: str, layer: str, saved: str, tensors: set[str]
) -> None:
    base = load(folders[family])
    before, spectra = output(base), len(list(spectral_layers(base)))
    config = peft.LoraConfig(
        target_modules=[layer], modules_to_save=[saved], init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(base, config)
    whole = [
        name.partition(f"{saved}.modules_to_save.default.")
        for name, own in model.named_parameters()
        if own.requires_grad
    ]
    assert {own for _, _, own in whole if own} == tensors
    with model.disable_adapter():
        torch.testing.assert_close(output(model), before)
    train(model)
    after = output(model)
    with model.disable_adapter():
        torch.testing.assert_close(output(model), before)
    assert len(list(spectral_layers(model))) == spectra  # the originals
    model.save_pretrained(tmp_path / "adapter")
    for settings in ({}, {"low_cpu_mem_usage": True}):
        again = peft.PeftModel.from_pretrained(load(folders[family]), tmp_path / "adapter", **settings)
        assert torch.equal(output(again), after)
    plain = load(folders[family])
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(plain), after)
    merge(folders[family].parent / "plain", [tmp_path / "adapter"], tmp_path / "merged")
    torch.testing.assert_close(output(load(tmp_path / "merged")), after, rtol=1e-4, atol=1e-5)
    again.base_model.model.dequantize()
    torch.testing.assert_close(output(again.merge_and_unload()), after, rtol=1e-4, atol=1e-5)


def test_peft_says_what_is_dense(folders: dict[str, Path]) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(
        UserWarning, match=r"modules_to_save: a module \(Linear, 6,144 weights\) is compressed; the copy"
    ):
        model = peft.get_peft_model(load(folders["llama"]), config)
    with pytest.warns(UserWarning, match=r"\(Linear, 6,144 weights\)"):
        model.add_adapter("second", config)
    model.set_adapter("second")
    assert model.base_model.model.lm_head.modules_to_save["second"].weight.requires_grad


def test_peft_copies_dense_modules_as_before(folders: dict[str, Path]) -> None:
    model = peft.get_peft_model(
        load(folders["llama"].parent / "plain"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )  # a warning would be an error
    wrapper = model.base_model.model.lm_head
    assert torch.equal(wrapper.modules_to_save["default"].weight, wrapper.original_module.weight)


@SAID
@pytest.mark.parametrize(
    ("family", "saved"), [("llama", "lm_head"), ("llama_tied", "embed_tokens"), ("qwen3_moe", "mlp")]
)
def test_ours_trains_saves_and_loads_a_dense_copy(
    folders: dict[str, Path], tmp_path: Path, family: str, saved: str
) -> None:
    model = load(folders[family])
    before = output(model)
    row = METHODS["lora"]
    targets = ModuleTargets(("q_proj",), modules_to_save=(saved,))
    spec = attach.inject(model, AdapterSpec(row, row.config(r=2), targets))
    torch.testing.assert_close(output(model), before)
    train(model)
    after = output(model)
    write_adapter(attach.state_of(model, spec), tmp_path / "adapter")
    again = load(folders[family])
    attach.load(again, read_adapter(tmp_path / "adapter"))
    assert torch.equal(output(again), after)
    merge(folders[family].parent / "plain", [tmp_path / "adapter"], tmp_path / "merged")
    torch.testing.assert_close(output(load(tmp_path / "merged")), after, rtol=1e-4, atol=1e-5)
    attach.detach(model)
    assert torch.equal(output(model), before)


@SAID
def test_a_model_that_was_compressed_in_memory() -> None:
    model = dense_model("llama_tied")
    compress_model(model, bits=4.0, min_weights=1000)
    twin = trained_copy(model)
    torch.testing.assert_close(output(twin), output(model), rtol=1e-4, atol=1e-5)
    assert type(twin.lm_head) is nn.Linear
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert type(trained_copy(model.lm_head)) is nn.Linear
    assert type(model.lm_head) is not nn.Linear
    transposed = dense_model("gpt2")
    compress_model(transposed, bits=4.0, min_weights=1000)
    with pytest.raises(ConfigError, match="got a Conv1D that was compressed in memory"):
        trained_copy(transposed.transformer.h[0].mlp)


def test_the_files_hold_the_copy_under_the_name_of_the_module(folders: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="modules_to_save"):
        peft.get_peft_model(load(folders["llama"]), config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(stored, load(folders["llama"].parent / "plain").lm_head.weight)
