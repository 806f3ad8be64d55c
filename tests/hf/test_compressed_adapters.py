"""Adapters on compressed models: ours and PEFT's attach and train; merging says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.fourierft import FourierFTConfig
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.errors import NotMergeableError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.hf.quantizer.load_compressed import load_compressed
from spectral_surgery.layers import SpectralLinear
from spectral_surgery.live.attach import adapted_layers, detach, inject
from spectral_surgery.live.merging import merge
from spectral_surgery.targets import ModuleTargets
from tests.support.compressed import compressed_folder, output, save_tokenizer

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = compressed_folder("llama", tmp_path_factory.mktemp("llama"))
    save_tokenizer(out)
    return out


def train(model: Any, steps: int = 8) -> tuple[float, float]:
    """Loss before and after some steps on one batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(parameter.grad is not None for parameter in trained)
    return losses[0], losses[-1]


def test_ours_trains_and_comes_off(folder: Path) -> None:
    model = load_compressed(folder)
    before = output(model)
    config = FourierFTConfig(n_frequency=100, scaling=2000.0, init_weights=True)
    inject(model, AdapterSpec(METHODS["fourierft"], config, ModuleTargets(target_modules=("q_proj", "down_proj"))))
    assert all(isinstance(layer.base_layer, SpectralLinear) for layer in adapted_layers(model).values())
    assert torch.equal(before, output(model))
    first, last = train(model)
    assert last < first - 0.05
    with pytest.raises(NotMergeableError, match="Decompress the model first"):
        merge(model)
    detach(model)
    assert torch.equal(before, output(model))


@pytest.mark.parametrize("method", ["LoraConfig", "FourierFTConfig"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_adapters_train(folder: Path, tmp_path: Path, method: str, family: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "embed_tokens"] if family == "llama" else ["c_attn"]
    settings: dict[str, Any] = {"r": 4} if method == "LoraConfig" else {"n_frequency": 100, "scaling": 2000.0}
    if method == "FourierFTConfig":
        targets = targets[:1]
    own = folder if family == "llama" else compressed_folder("gpt2", tmp_path)
    model = peft.get_peft_model(load_compressed(own), getattr(peft, method)(target_modules=targets, **settings))
    first, last = train(model)
    assert last < first
    with pytest.raises(NotMergeableError, match=r"weight: expected.*got a write into it.* model.dequantize\(\)"):
        model.merge_and_unload()
    before = output(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_compressed(own), tmp_path / "adapter")
    assert torch.allclose(before, output(again), atol=1e-6)


def test_pefts_adapters_on_a_model_without_input_embeddings(tmp_path: Path) -> None:
    """PEFT asks for them where a model says that it has ties, even none of them; a plain one says nothing."""
    import transformers

    peft = pytest.importorskip("peft")
    config = transformers.ConvNextV2Config(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], image_size=32)
    dense = transformers.ConvNextV2ForImageClassification(config)
    with pytest.raises(NotImplementedError):
        dense.get_input_embeddings()
    dense.save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "small", CompressOptions(Target("bits", 4.0), min_weights=1000))
    model = transformers.ConvNextV2ForImageClassification.from_pretrained(tmp_path / "small")
    adapted = peft.get_peft_model(model, peft.FourierFTConfig(n_frequency=50, target_modules=["pwconv1"]))
    layers = [own.base_layer for own in adapted.modules() if hasattr(own, "fourierft_spectrum")]
    assert len(layers) == 2
    assert any(isinstance(own, SpectralLinear) for own in layers)


def test_our_adapter_on_an_embedding_and_a_transposed_layer(tmp_path: Path) -> None:
    model = load_compressed(compressed_folder("gpt2", tmp_path))
    config = FourierFTConfig(n_frequency=50, scaling=2000.0, init_weights=True)
    spec = inject(model, AdapterSpec(METHODS["fourierft"], config, ModuleTargets(target_modules=("wpe", "c_fc"))))
    assert len(adapted_layers(model)) == 3
    assert spec.targets.fan_in_fan_out is False  # not all of them are transposed
    first, last = train(model)
    assert last < first


def test_train_command_takes_a_compressed_base(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from spectral_surgery.commands.train import train as train_adapter
    from spectral_surgery.text.settings import TrainData
    from spectral_surgery.training.settings import TrainSettings

    (tmp_path / "text.txt").write_text("\n".join("w5 w6 w7 w8 w9 w10 w11 w12" for _ in range(24)))
    config = FourierFTConfig(n_frequency=100, scaling=2000.0, init_weights=True)
    spec = AdapterSpec(METHODS["fourierft"], config, ModuleTargets(target_modules=("q_proj", "down_proj")))
    settings = TrainSettings(learning_rate=5e-2, head_learning_rate=1e-3, epochs=0, steps=6, batch_size=8, device="cpu")
    report = train_adapter(folder, tmp_path / "adapter", TrainData(tmp_path / "text.txt"), spec, settings)
    assert report.after["loss"] < report.before["loss"]
