"""Merging into live models and taking it back, and the record that makes it exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spectral_surgery.adapters.layer import AdaptedLayer
from spectral_surgery.errors import ConfigError, NotMergeableError, UnmergeError
from spectral_surgery.live import attach
from spectral_surgery.live.merging import merge, merge_and_unload, total_delta, unmerge
from spectral_surgery.live.undo import merge_weight, unmerge_weight
from tests.live.test_attach import IDS, Model, bits, lora, same_bits, stir

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.1, 30.0])
def test_a_weight_comes_back_bit_for_bit(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(64, 96, generator=generator)).to(dtype)
    base[0, :6] = torch.tensor([0.0, -0.0, 6e-8, -6e-8, torch.finfo(dtype).max / 2, torch.finfo(dtype).tiny])
    delta = 0.02 * scale * torch.randn(64, 96, generator=generator, dtype=torch.float64)
    merged, undo = merge_weight(base, delta, "w")
    grid = 2.0**-20 * float(delta.abs().max()) + torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # and one subnormal
    expected = (base.float() + delta.float()).to(dtype)
    torch.testing.assert_close(merged, expected, rtol=torch.finfo(dtype).eps, atol=grid)
    assert equal_bits(unmerge_weight(merged, delta, undo, "w"), base)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_finite_numbers_come_back(data: st.DataObject, dtype: torch.dtype) -> None:
    limit = float(torch.finfo(dtype).max) / 4
    numbers = st.lists(st.floats(-limit, limit, width=32), min_size=5, max_size=5)
    base = torch.tensor(data.draw(numbers)).to(dtype)
    delta = torch.tensor(data.draw(numbers), dtype=torch.float64)
    merged, undo = merge_weight(base, delta, "w")
    assert equal_bits(unmerge_weight(merged, delta, undo, "w"), base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_another_machine_does_not_matter(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 50, generator=generator).to(dtype)
    delta = 0.1 * torch.randn(40, 50, generator=generator, dtype=torch.float64)
    merged, undo = merge_weight(base, delta, "w")
    noisy = delta * (1 + 1e-15 * torch.randn(40, 50, generator=generator, dtype=torch.float64))
    assert equal_bits(unmerge_weight(merged, noisy, undo, "w"), base)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.05), (torch.float16, 0.05), (torch.float32, 0.05)])
def test_the_record_is_small_while_the_update_is(dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    base = (0.02 * torch.randn(512, 512, generator=generator)).to(dtype)
    delta = 0.002 * torch.randn(512, 512, generator=generator, dtype=torch.float64)
    merged, undo = merge_weight(base, delta, "w")
    assert len(undo.data) <= share * merged.nbytes


def test_what_cannot_be_merged_says_why() -> None:
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"w: expected one of float32, bfloat16, float16, got int8"):
        merge_weight(torch.ones(2, dtype=torch.int8), one, "w")
    with pytest.raises(NotMergeableError, match="w: expected finite numbers, got NaN or infinity in the weight"):
        merge_weight(torch.full((2,), torch.nan), one, "w")
    with pytest.raises(NotMergeableError, match="w: expected finite numbers, got NaN or infinity in the update"):
        merge_weight(torch.ones(2), one * torch.inf, "w")
    with pytest.raises(NotMergeableError, match=r"w: expected sums up to 6\.55e"):
        merge_weight(torch.ones(2, dtype=torch.float16), one * 1e6, "w")
    with pytest.raises(ConfigError, match="merge: expected one adapter or more, got none"):
        total_delta([], (2, 2), transposed=False)


def test_a_changed_weight_or_update_or_record_is_refused() -> None:
    base, delta = torch.randn(9, 9), torch.randn(9, 9, dtype=torch.float64)
    merged, undo = merge_weight(base, delta, "w")
    with pytest.raises(UnmergeError, match="w: expected the weight as merge wrote it, got one that was changed"):
        unmerge_weight(merged + 1, delta, undo, "w")
    with pytest.raises(UnmergeError, match=r"w: .*the base does not come out"):
        unmerge_weight(merged, delta + 1e-4, undo, "w")
    for data in (b"", undo.data[:-1], undo.data + b"x", b"\xff" * len(undo.data)):
        with pytest.raises(UnmergeError, match=r"w: .*the base does not come out"):
            unmerge_weight(merged, delta, replace(undo, data=data), "w")


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge_a_model(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model().to(dtype)
    before, plain = bits(model), model(IDS)
    attach.inject(model, lora("q_proj", "v_proj", "embed"), "a")
    attach.inject(model, lora("q_proj"), "b")
    attach.set_active(model, {"a": 1.0, "b": -0.5})
    stir(model)
    beside = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), beside, rtol=0.05, atol=0.05 if dtype != torch.float32 else 1e-5)
    assert not torch.equal(model(IDS), plain)
    unmerge(model)
    assert torch.equal(model(IDS), beside)
    attach.detach(model)
    assert same_bits(bits(model), before)


def test_merged_models_refuse_what_would_go_wrong() -> None:
    model = Model()
    attach.inject(model, lora("q_proj"))
    stir(model)
    with pytest.raises(ConfigError, match="unmerge: expected a model with merged adapters, got none"):
        unmerge(model)
    merge(model)
    with pytest.raises(ConfigError, match=r"layers\.0\.q_proj: expected adapters beside the weights, got merged ones"):
        merge(model)
    text = "adapters default: expected a model.*got merged ones"
    with pytest.raises(ConfigError, match=text):
        attach.set_active(model, {})
    with pytest.raises(ConfigError, match=text):
        attach.detach(model)
    with (
        attach.disabled(model),
        pytest.raises(ConfigError, match="disable: expected separate adapters, got merged ones"),
    ):
        model(IDS)
    unmerge(model)
    attach.set_active(model, {})
    with pytest.raises(ConfigError, match="merge: expected an active adapter, got none"):
        merge(model)


def test_a_failure_leaves_every_layer_unmerged() -> None:
    model = Model()
    attach.inject(model, lora("q_proj", "score"))
    stir(model)
    before = bits(model)
    with torch.no_grad():
        model.score.adapters["default"].B.fill_(torch.nan)
    with pytest.raises(NotMergeableError, match="score: expected finite numbers, got NaN or infinity in the update"):
        merge(model)
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before if "score.adapters" not in name)


def test_merge_and_unload_leaves_a_plain_model() -> None:
    model = Model()
    names = set(model.state_dict())
    attach.inject(model, lora("q_proj", bias="all", modules_to_save=("score",)))
    stir(model)
    beside = model(IDS)
    merge_and_unload(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(IDS), beside)


def test_a_base_without_a_dense_weight() -> None:
    class Quantised(nn.Module):
        in_features, out_features = 6, 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    net = nn.Sequential(Quantised())
    attach.inject(net, lora("0"))
    with pytest.raises(NotMergeableError, match=r"0: expected a dense .* to merge into, got a Quantised.*Decompress"):
        merge(net)


def test_tied_weights_stay_tied() -> None:
    model = Model()
    model.score = nn.Linear(6, 11, bias=False)
    model.score.weight = model.embed.weight
    before = bits(model)
    attach.inject(model, lora("embed"))
    stir(model)
    merge(model)
    layer = model.embed
    assert isinstance(layer, AdaptedLayer)
    assert model.score.weight is layer.base_layer.weight
    assert not torch.equal(model.score.weight, before["embed.weight"])
    unmerge(model)
    assert torch.equal(model.score.weight, before["embed.weight"])
