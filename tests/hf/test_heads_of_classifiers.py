"""The head of a compressed classifier is dense, so that adapters can train a copy of it, as PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.inject import inject
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.targets import ModuleTargets

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of a name in transformers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SIZES)
    transformers.RobertaForSequenceClassification(config).save_pretrained(root / "source")
    compress(root / "source", root / "ours", CompressOptions(Target("bits", 4), min_weights=512))
    decompress(root / "ours", root / "plain")
    config = METHODS["fourierft"].config(n_frequency=20, init_weights=False)
    inject(root / "source", root / "adapter", AdapterSpec(METHODS["fourierft"], config, ModuleTargets("all-linear")))
    return root


def load(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_it_is_dense_and_said_so_and_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = load(folder / "ours")
    assert set(model.hf_quantizer.held_dense) == {"classifier.dense.weight"}
    assert type(model.classifier.dense) is torch.nn.Linear
    model.save_pretrained(tmp_path / "again")
    decompress(tmp_path / "again", tmp_path / "plain")
    first, second = read_index(folder / "plain"), read_index(tmp_path / "plain")
    for name, info in first.tensors.items():
        assert torch.equal(read_tensor(info), read_tensor(second.tensors[name])), name


def test_peft_loads_an_adapter_with_the_head_and_trains_a_copy(folder: Path) -> None:
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(load(folder / "plain"), folder / "adapter").eval()(IDS).logits
    model = peft.PeftModel.from_pretrained(load(folder / "ours"), folder / "adapter", is_trainable=True).eval()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name and name.endswith("dense.weight") for name in trained)
