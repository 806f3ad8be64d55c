"""Blocks are run by themselves as the model runs them, where it gives each of them something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spectral_surgery.errors import TargetError
from spectral_surgery.live.blocks import (
    UnchainedError,
    captured_inputs,
    find_blocks,
    has_blocks,
    hidden_of,
)
from spectral_surgery.live.stacks import chain_of

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = SIZES | SLIDING | {"num_key_value_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
TEXT = SIZES | {"num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows and angles": ("Gemma3TextModel", GEMMA),  # window and full attention, with different rotary angles
    "local and global": ("ModernBertModel", SIZES | {"local_attention": 4, "global_attn_every_n_layers": 2}),
    "bias of the first": (
        "T5EncoderModel",
        {"vocab_size": 32, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2, "pad_token_id": 0},
    ),
    "images beside text": (
        "LlavaModel",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 31,
        },
    ),
    "blocks that look at images": (
        "MllamaModel",
        {
            "text_config": {**TEXT, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
                "max_num_tiles": 1,
            },
        },
    ),
}
BATCHES = [
    {"input_ids": torch.randint(1, 30, (2, 12), generator=torch.Generator().manual_seed(0)),
     "attention_mask": torch.ones(2, 12, dtype=torch.int64)},
]  # fmt: skip


def model_of(kind: str) -> Any:
    name, settings = MODELS[kind]
    own = getattr(transformers, name)
    torch.manual_seed(0)
    model = own(own.config_class(**settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_every_block_gives_what_it_gives_in_the_model(kind: str) -> None:
    model = model_of(kind)
    assert has_blocks(model)
    name, blocks = find_blocks(model)
    assert "vision" not in name
    seen: dict[int, torch.Tensor] = {}
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *own, number=number: seen.__setitem__(number, hidden_of(own[-1])))
    with torch.no_grad():
        model(**BATCHES[0])
    assert seen
    expected = dict(seen)
    for number, (_, _, run) in enumerate(chain_of(model).in_turn(BATCHES)):
        found = next(run())
        if number in expected:
            torch.testing.assert_close(found, expected[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("XLMModel", {"vocab_size": 32, "emb_dim": 32, "n_layers": 2, "n_heads": 2}),  # attention is in another list
        ("AlbertModel", SIZES | {"embedding_size": 16}),  # one block that is run three times
        ("BartModel", {"vocab_size": 32, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0}),
    ],
)
def test_what_is_no_one_list_of_blocks_is_run_as_a_whole(name: str, settings: dict[str, Any]) -> None:
    own = getattr(transformers, name)
    model = own(own.config_class(**settings)).eval()
    assert not has_blocks(model)
    ((block, module, run),) = chain_of(model).in_turn(BATCHES)
    assert (block, module) == ("", model)
    assert next(run()).shape == (2, 12, model.config.hidden_size)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.layers[0](self.embed(input_ids))
        return self.layers[1](self.layers[0](x))


def test_blocks_that_are_run_again_are_refused() -> None:
    with pytest.raises(TargetError, match="Twice: expected a model that runs each of its blocks once"):
        next(chain_of(Twice()).in_turn(BATCHES))


class Residual(nn.Module):
    """Adds around its layers, not within them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor, **_: bool) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def test_a_model_that_adds_around_its_blocks_is_run_as_a_whole() -> None:
    torch.manual_seed(0)
    model, batch = Residual().eval(), {"x": torch.randn(2, 3, 4)}
    with pytest.raises(UnchainedError, match="got one that changes it"):
        captured_inputs(model, model.layers, batch)
    (turn,) = chain_of(model).in_turn([batch])
    name, module, run = turn
    assert (name, module) == ("", model)
    assert torch.equal(next(iter(run())), model(**batch))
