"""Layers that pass for those of torch and transformers, and weights that are decoded only by who computes with them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from spectral_surgery.errors import NotMergeableError
from spectral_surgery.integrations.stand_ins import LazyWeight, stand_in
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear
from spectral_surgery.ops.spectral_matmul import Int8Form


def linear() -> SpectralLinear:
    torch.manual_seed(0)
    return SpectralLinear.from_dense(nn.Linear(48, 32), bits=6)


def test_a_weight_is_decoded_by_who_computes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    dense = layer.spectrum.to_dense()
    decoded = []
    monkeypatch.setattr(Int8Form, "levels", lambda form, rows: decoded.append(1) or form.codes[rows])
    weight = stand_in(layer).weight
    assert isinstance(weight, LazyWeight)
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dense.dtype, dense.device)
    assert not weight.requires_grad
    assert not decoded
    x = torch.randn(3, 48, requires_grad=True)
    assert torch.allclose(nn.functional.linear(x, weight), x @ dense.T, atol=1e-6)
    assert decoded
    (x @ weight.T).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, dense.sum(0).expand(3, -1), atol=1e-5)
    assert type(weight + 1) is type(weight.data) is torch.Tensor
    assert torch.equal(weight[3:5], dense[3:5])


def test_a_weight_cannot_be_written() -> None:
    weight = stand_in(linear()).weight
    with pytest.raises(NotMergeableError, match=r"cannot be written; .* model.dequantize\(\)"):
        weight.data += 1


def test_stand_ins_are_what_they_stand_for() -> None:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    x, ids = torch.randn(2, 48), torch.tensor([[0, 5]])
    made = (
        (linear(), nn.Linear, x),
        (SpectralEmbedding.from_dense(nn.Embedding(20, 32), bits=6), nn.Embedding, ids),
        (SpectralConv1D.from_dense(conv1d(64, 48), bits=6), conv1d, x),
    )
    for layer, kind, given in made:
        before, weight = layer(given), layer.weight
        assert isinstance(stand_in(layer), kind)
        assert torch.equal(before, layer(given))
        assert torch.equal(before, copy.deepcopy(layer)(given))
        assert torch.equal(layer.weight.data, weight)
        assert layer.weight.shape == weight.shape
    again = pickle.loads(pickle.dumps(made[0][0]))
    assert torch.equal(made[0][0](x), again(x))
