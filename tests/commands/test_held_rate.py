"""The rate of a model in training is held by wider dead zones, and only where it rose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.frames import encode_rows
from spectral_surgery.codec.quantizers import QUANTIZERS
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.heal.held_rate import HeldRate
from spectral_surgery.live.trained_spectra import kept_spectra, train_kept, trained_weights


def in_training(quantizer: str = "lattice", *, shared: bool = False) -> tuple[nn.Sequential, list[nn.Parameter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 192, bias=False), nn.Linear(128, 192, bias=False))
    if shared:
        model[1].weight = model[0].weight
    names = [name for name, _ in model.named_parameters()]
    own = dict(model.named_parameters())
    target = Target("bits", 1.0)
    return model, train_kept(
        model, {name: [encode(own[name].detach(), target, quantizer=quantizer)[0].decode()] for name in names}
    )


def grow(values: nn.Parameter, most: float = 2.0) -> None:
    """Each by another factor: codes become more even."""
    with torch.no_grad():
        values.mul_(0.5 + most * torch.rand(values.shape, generator=torch.Generator().manual_seed(1)))


def stored(model: nn.Module) -> float:
    """Bits of all frames."""
    return 8.0 * sum(sum(map(len, encode_rows(one.codes, 64)[1])) for (one,) in kept_spectra(model).values())


@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_coefficients_that_grew_cost_no_more_bits(quantizer: str) -> None:
    model, values = in_training(quantizer)
    hold, before = HeldRate(model), stored(model)
    assert 0.97 < hold.bits / before < 1  # there are tables and states of the coder too
    for own in values:
        grow(own)
    grown = stored(model)
    hold()
    assert grown > 1.03 * before
    assert 0.98 * before < stored(model) <= 1.005 * before
    assert {kept.dead_zone for kept, _ in trained_weights(model)} != {1.0}


def test_coefficients_that_shrank_keep_the_usual_dead_zone() -> None:
    model, values = in_training()
    hold = HeldRate(model)
    hold()
    assert {kept.dead_zone for kept, _ in trained_weights(model)} == {1.0}
    with torch.no_grad():
        for own in values:
            own.mul_(0.8)
    hold()
    assert {kept.dead_zone for kept, _ in trained_weights(model)} == {1.0}


def test_the_same_values_are_given_the_same_dead_zone() -> None:
    model, values = in_training()
    hold, start = HeldRate(model), [own.detach().clone() for own in values]
    found = []
    for most in (1.5, 2.0, 1.5):
        with torch.no_grad():
            for own, first in zip(values, start, strict=True):
                own.copy_(first)
        for own in values:
            grow(own, most)
        hold()
        found.append(trained_weights(model)[0][0].dead_zone)
    assert found[0] == found[2] != found[1]


def test_a_shared_weight_counts_once_and_is_the_same_everywhere() -> None:
    model, (values,) = in_training(shared=True)
    hold = HeldRate(model)
    assert 0.97 < hold.bits / stored(model) < 1
    grow(values)
    hold()
    assert torch.equal(model[0].weight, model[1].weight)
    assert trained_weights(model)[0][0].dead_zone == trained_weights(model)[1][0].dead_zone > 1


@pytest.mark.parametrize("target", [Target("bits", 1.0), Target("density", 0.2)], ids=["bits", "density"])
def test_some_tiles_of_rows_stand_for_all(target: Target) -> None:
    weight = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(128, 1000, bias=False)
    (values,) = train_kept(model, {"weight": [encode(weight, target)[0].decode()]})
    ((kept, _),) = trained_weights(model)
    whole = kept.bits(values.detach(), 1.5)
    assert kept.bits(values.detach(), 1.5, every=4) == pytest.approx(whole, rel=0.02)
    assert kept.bits(values.detach(), 1.5, every=4) != whole
    assert kept.bits(values.detach(), 1.5, every=100) == pytest.approx(whole, rel=0.1)  # the first tile alone
