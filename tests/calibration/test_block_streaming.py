"""Models that read their weights when they are needed: the same outputs, and only one block in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from spectral_surgery.calibration.block_streaming import ActivationStore, load_lazily
from spectral_surgery.files.index import read_index
from spectral_surgery.hf.models import load_model
from spectral_surgery.live.blocks import find_blocks, hidden_of
from tests.commands.test_calibrate import KINDS, save_model


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [*((kind, "AutoModel") for kind in KINDS), *((kind, "AutoModelForCausalLM") for kind in KINDS if kind != "bert")],
)
def test_outputs_are_those_of_the_model_and_nothing_stays(tmp_path: Path, kind: str, auto_class: str) -> None:
    folder = save_model(kind, tmp_path / "model")
    lazy = load_lazily(folder, read_index(folder), auto_class)
    assert not lazy.whole
    assert all(parameter.is_meta for parameter in lazy.model.parameters())
    ids = torch.arange(2, 12)[None]
    with lazy.holding(), torch.no_grad():
        own = lazy.model(input_ids=ids)[0]
    model, _ = load_model(folder, auto_class, dtype=torch.float32)
    assert torch.equal(own, model(input_ids=ids)[0])
    assert all(parameter.is_meta for parameter in lazy.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_at_a_time_gives_what_the_model_gives(tmp_path: Path, kind: str) -> None:
    folder = save_model(kind, tmp_path / "model")
    lazy = load_lazily(folder, read_index(folder), "AutoModel")
    model, _ = load_model(folder, "AutoModel", dtype=torch.float32)
    batch = {"input_ids": torch.arange(2, 12)[None], "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    shelf = ActivationStore(0, tmp_path)  # every activation in a file
    held = []
    for name, block, run in lazy.chain.in_turn([batch], shelf.put):
        there = [own for own, parameter in lazy.model.named_parameters() if not parameter.is_meta]
        assert all(own.startswith(f"{name}.") for own in there)
        assert len(there) == len(list(block.parameters()))
        held.append((next(run()), next(run())))  # a second run gives the same: nothing was cached
    seen = []
    for block in find_blocks(model)[1]:
        block.register_forward_hook(lambda _, __, output: seen.append(hidden_of(output)))
    model(**batch)
    for (first, second), wanted in zip(held, seen, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, wanted, rtol=1e-5, atol=1e-5)
    shelf.close()
    assert not list(tmp_path.glob("activations-*"))


def test_fused_experts_are_put_together_when_their_block_has_its_turn(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.commands.test_train import save_tokenizer

    config = Qwen3MoeConfig(
        vocab_size=12, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    dense = Qwen3MoeForCausalLM(config)
    dense.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    lazy = load_lazily(tmp_path, read_index(tmp_path), "AutoModelForCausalLM")
    assert not lazy.whole
    with lazy.holding("model.layers.0."):
        for name, parameter in lazy.model.model.layers[0].named_parameters():
            assert torch.equal(parameter, dense.model.layers[0].get_parameter(name))
    assert all(parameter.is_meta for parameter in lazy.model.parameters())


def test_a_shelf_keeps_what_it_was_given(tmp_path: Path) -> None:
    shelf = ActivationStore(100, tmp_path)
    given = [torch.randn(4, 5), torch.randn(30), torch.randn(0, 3), torch.arange(7)]
    kept = list(map(shelf.put, given))
    for own, held in zip(given, kept, strict=True):
        assert torch.equal(own, held())
    assert len(list(tmp_path.glob("activations-*/*"))) == 2
    del kept, held
    assert not list(tmp_path.glob("activations-*/*"))
    again = shelf.put(torch.ones(25))  # there is room again
    assert again().sum() == 25
    assert not list(tmp_path.glob("activations-*/*"))
    shelf.close()
