"""Layers that pass for those of torch and transformers, and weights that are decoded only by who computes with them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import NotMergeableError
from spectral_surgery.hf.quantizer.class_swap import stand_in, stand_out
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear, SpectralWeight
from spectral_surgery.matmul import LevelForm


def linear() -> tuple[nn.Linear, SpectralLinear]:
    """A layer that a spectrum stands in for, and one of ours with the same spectrum."""
    torch.manual_seed(0)
    dense = nn.Linear(48, 32)
    ours = SpectralLinear.from_dense(dense, bits=6)
    stand_in(dense, ours.spectrum)
    return dense, ours


def test_a_weight_is_decoded_by_who_does_more_than_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, ours = linear()
    dense = ours.spectrum.to_dense()
    decoded = []
    monkeypatch.setattr(LevelForm, "levels", lambda form, rows: decoded.append(1) or form.codes[rows])
    weight = layer.weight
    assert isinstance(weight, LazyWeight)
    assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dense.dtype, dense.device)
    assert weight.stride() == dense.stride()
    assert not weight.requires_grad
    x = torch.randn(3, 48, requires_grad=True)
    assert torch.allclose(nn.functional.linear(x, weight), x @ dense.T, atol=1e-6)
    (x @ weight.T).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, dense.sum(0).expand(3, -1), atol=1e-5)
    assert not decoded
    assert type(weight + 1) is type(weight.data) is torch.Tensor
    assert decoded
    torch.testing.assert_close(weight[3:5] * 1, dense[3:5], rtol=1e-5, atol=1e-6)


def test_a_weight_cannot_be_written() -> None:
    weight = linear()[0].weight
    with pytest.raises(NotMergeableError, match=r"weight: expected.*got a write into it.* model.dequantize\(\)"):
        weight.data += 1


def test_stand_ins_are_what_they_stand_for() -> None:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    x, ids = torch.randn(2, 48), torch.tensor([[0, 5]])
    embedding = nn.Embedding(20, 32)
    turned = conv1d(64, 48)
    made = (
        (*linear(), nn.Linear, x),
        (embedding, SpectralEmbedding.from_dense(embedding, bits=6), nn.Embedding, ids),
        (turned, SpectralConv1D.from_quantized(spectrum_of(turned.weight), turned.bias), conv1d, x),
    )
    for layer, ours, kind, given in made:
        if layer.weight is layer._parameters.get("weight"):
            spectrum = ours.spectrum if kind is not conv1d else SpectralWeight.from_spectra(spectrum_of(layer.weight))
            stand_in(layer, spectrum)
        assert isinstance(layer, kind)
        assert type(layer).__name__ in ("Conv1D", "LinearStandIn", "EmbeddingStandIn")
        expected = ours(given)
        assert torch.equal(expected, layer(given))
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(again) is type(layer)
            assert torch.equal(expected, again(given))
        assert torch.equal(layer.weight.data, ours.weight)
        assert layer.weight.shape == ours.weight.shape
        stand_out(layer, nn.Parameter(layer.weight.data.contiguous()))
        assert type(layer) is kind
        assert not list(layer.children())
        assert torch.allclose(expected, layer(given), atol=1e-5)


def spectrum_of(weight: torch.Tensor) -> Any:
    return encode(weight.detach(), Target("bits", 6))[0]
