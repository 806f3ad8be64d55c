"""Compressing a model in memory: every layer or none, tied weights once, outputs those of the decompressed model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.errors import ConfigError, TargetError
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear
from spectral_surgery.live.compression import compress_model
from spectral_surgery.targets import ModuleTargets


class Tied(nn.Module):
    """An embedding, a linear layer that is used twice, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(200, 64, padding_idx=1)
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.head = nn.Linear(64, 200, bias=False)
        self.head.weight = self.embedding.weight
        self.small = nn.Linear(64, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.first(self.embedding(ids)).relu()))


def test_everything_is_replaced_and_tied_weights_once() -> None:
    model = Tied().eval()
    ids = torch.arange(6).reshape(2, 3)
    report = compress_model(model, max_error=0.02)
    assert report.replaced == ("embedding", "first", "again", "head")
    assert isinstance(model.embedding, SpectralEmbedding)
    assert isinstance(model.head, SpectralLinear)
    assert model.head.spectrum is model.embedding.spectrum
    assert model.first is model.again
    assert type(model.small) is nn.Linear
    assert not model.head.training
    assert report.dense_bytes == 4 * (200 * 64 + 64 * 64)
    assert report.resident_bytes == 200 * 64 + 64 * 64 + 8
    y = model(ids)
    for name in ("embedding", "first", "again", "head"):
        setattr(model, name, getattr(model, name).to_dense())
    torch.testing.assert_close(y, model(ids), rtol=1e-4, atol=1e-4)


def test_targets_choose() -> None:
    model = Tied()
    report = compress_model(model, bits=4, targets=ModuleTargets(("first", "small")), min_weights=1)
    assert report.replaced == ("first", "small")
    assert type(model.head) is nn.Linear


def test_after_an_error_nothing_is_replaced() -> None:
    model = Tied()
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match="resident 'int4': codes reach"):
        compress_model(model, max_error=0.02, resident="int4")
    with pytest.raises(ConfigError, match="expected one of sparsity, bits and max_error, got 0"):
        compress_model(model)
    with pytest.raises(TargetError, match="matches none of 4 modules"):
        compress_model(model, bits=4, targets=ModuleTargets(("q_proj",)))
    with pytest.raises(TargetError, match="Conv1D of 1000000 or more weights, got none in Tied"):
        compress_model(model, bits=4, min_weights=1_000_000)
    assert dict(model.named_modules()) == before


def test_subclasses_and_rescaled_embeddings_stay() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict({"odd": Odd(64, 64), "norm": nn.Embedding(64, 64, max_norm=1.0), "plain": nn.Linear(64, 64)})
    assert compress_model(model, bits=4).replaced == ("plain",)


def test_a_gpt2_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=200, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = compress_model(model, max_error=0.03)
        after = model(ids).logits
    assert isinstance(model.transformer.h[0].attn.c_attn, SpectralConv1D)
    assert "lm_head" in report.replaced
    assert 0 < float((after - before).norm() / before.norm()) < 0.1
