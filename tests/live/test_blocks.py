"""Blocks are run in turn with the inputs of a whole forward pass, and moments are those of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_surgery.errors import ConfigError, TargetError
from spectral_surgery.live.blocks import find_blocks
from spectral_surgery.live.moments import moments_of
from spectral_surgery.live.stacks import chain_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        return x + self.out(self.q(x) * self.k(x)) * scale, None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.few = nn.ModuleList([nn.Linear(1, 1)])
        self.embed = nn.Embedding(9, 5)
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, scale=0.5)[0]
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


BATCHES = [{"input_ids": torch.tensor([[1, 2, 3]])}, {"input_ids": torch.tensor([[4], [5]])}]


def test_the_last_block_gives_what_the_model_gives(model: Model) -> None:
    *_, (name, _, run) = chain_of(model).in_turn(BATCHES)
    assert name == "layers.2"
    for batch, output in zip(BATCHES, run(), strict=True):
        torch.testing.assert_close(output, model(**batch))


def test_later_blocks_see_what_was_changed(model: Model) -> None:
    for name, block, run in chain_of(model).in_turn(BATCHES):
        if name == "layers.0":
            block.out.weight.data.mul_(2)
        last = run
    torch.testing.assert_close(next(last()), model(**BATCHES[0]))


def test_moments_are_those_of_the_inputs(model: Model) -> None:
    _, block, run = next(iter(chain_of(model).in_turn(BATCHES)))
    layers = {"q": block.q, "k": block.k, "out": block.out}
    with moments_of(layers) as moments:
        assert len(list(run())) == len(BATCHES)
    x = torch.cat([model.embed(batch["input_ids"]).reshape(-1, 5) for batch in BATCHES])
    torch.testing.assert_close(moments["q"], x.T @ x)
    assert moments["k"] is moments["q"]
    inner = block.q(x) * block.k(x)
    torch.testing.assert_close(moments["out"], inner.T @ inner)


def test_models_without_blocks_or_text(model: Model) -> None:
    assert find_blocks(model)[0] == "layers"
    with pytest.raises(TargetError, match="Linear: expected a transformer, got a model without a list of blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="calibrate: expected something to run the model on, got nothing"):
        next(chain_of(model).in_turn([]))
    model.layers.extend([Block() for _ in range(9)])

    def embed_only(input_ids: torch.Tensor) -> torch.Tensor:
        return model.embed(input_ids)

    model.forward = embed_only
    with pytest.raises(TargetError, match="Model: expected a model that runs the first of its 12 blocks on text alone"):
        next(chain_of(model).in_turn(BATCHES))
