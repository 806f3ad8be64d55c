"""The sampler of FourierFT's frequency bias, and that its places are stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS, fourierft
from spectral_surgery.adapters.fourierft import FourierFT, FourierFTConfig
from spectral_surgery.adapters.fourierft_biased import (
    Band,
    FourierFTBiasedConfig,
    basis_functions,
    build,
    draw,
)
from spectral_surgery.adapters.layer import AdaptedLayer
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.fourier import reference


@pytest.mark.parametrize(("center", "total"), [(0, 124005), (100, 168894), (200, 249747), (350, 293858), (480, 105874)])
def test_sampling_weights_sum_to_the_papers(center: int, total: int) -> None:
    band = Band(center / 768, 200 / 768)
    weights = band.log_weights(torch.arange(768), (768, 768)).exp()
    assert round(weights.double().sum().item()) == pytest.approx(total, abs=1)
    assert weights[0, 0] == (1 if center == 0 else 0)
    assert weights.max() <= 1


def test_sampling_weights_are_the_formula() -> None:
    weights = Band(0.2, 0.1).log_weights(torch.tensor([3, 9]), (10, 8)).exp()
    for row, j in enumerate((3, -1)):
        for column in range(8):
            d = math.hypot(j / 10, (column - 8 if column > 4 else column) / 8)
            expected = math.exp(-(((d**2 - 0.04) / (d * 0.1)) ** 2)) if d else 0
            assert weights[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("shape", [(6, 8), (7, 8), (6, 9), (7, 9), (1, 4)])
def test_every_basis_function_can_be_drawn_once(shape: tuple[int, int]) -> None:
    rows, columns = shape
    functions = set()
    for j in range(rows):
        for k in range(columns):
            functions.add(frozenset([(j, k), (-j % rows, -k % columns)]))
    assert basis_functions(shape) == len(functions)
    places = draw(shape, len(functions), Band(0.1, 0.2), 0).tolist()
    drawn = {frozenset([(p // columns, p % columns), (-(p // columns) % rows, -p % columns)]) for p in places}
    assert drawn == functions
    refusal = f"n_frequency: expected 1 to {len(functions)} for .*, got {len(functions) + 1}"
    with pytest.raises(ConfigError, match=refusal):
        draw(shape, len(functions) + 1, Band(0.1, 0.2), 0)


def test_places_follow_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, band = (96, 128), Band(0.25, 0.1)
    weights = band.log_weights(torch.arange(96), shape).exp().flatten()
    counts = torch.zeros(weights.numel())
    for seed in range(300):
        places = draw(shape, 20, band, seed)
        assert (places[1:] > places[:-1]).all()
        counts[places] += 1
    p = torch.stack([counts, weights])
    rings = (torch.hypot(torch.fft.fftfreq(96)[:, None], torch.fft.fftfreq(128)).flatten() * 20).long()
    shares = torch.zeros(2, int(rings.max()) + 1).index_add(1, rings, p / p.sum(1, keepdim=True))
    torch.testing.assert_close(shares[0], shares[1], rtol=0, atol=0.02)
    monkeypatch.setattr("spectral_surgery.adapters.fourierft_biased._BLOCK", 1000)
    draw.cache_clear()
    assert len(draw(shape, 20, band, 0).unique()) == 20
    draw.cache_clear()


def test_places_depend_on_the_seed_alone() -> None:
    band = Band(0.0, 0.26)
    first = draw((20, 30), 50, band, 1).clone()
    draw.cache_clear()
    torch.manual_seed(5)
    with torch.device("meta"):
        assert torch.equal(draw((20, 30), 50, band, 1), first)
    assert not torch.equal(draw((20, 30), 50, band, 2), first)


def test_places_are_stored() -> None:
    config = FourierFTBiasedConfig(n_frequency=9)
    adapter = build(config, 12, 20)
    assert set(adapter.state_dict()) == {"spectrum", "positions"}
    other = torch.arange(9, dtype=torch.int32)
    adapter.load_state_dict({"spectrum": torch.ones(9), "positions": other})
    spectrum = torch.zeros(240)
    spectrum[:9] = 1
    expected = torch.fft.ifft2(spectrum.reshape(12, 20)).real * 150
    torch.testing.assert_close(adapter.delta_weight(), expected)
    with pytest.raises(
        CheckpointError, match=r"positions: expected.*got \[235, 236, 237, 238\]\.\.\.\. Write the adapter"
    ):
        adapter.load_state_dict({"spectrum": torch.ones(9), "positions": other + 235})


def loaded(adapter: FourierFT, positions: Tensor, how: str) -> None:
    if how == "transformers":  # which sets the tensors one by one
        adapter.positions = positions
    else:
        state = {"spectrum": adapter.spectrum.detach().clone(), "positions": positions}
        adapter.load_state_dict(state, assign=how == "assigned")


@pytest.mark.parametrize("how", ["copied", "assigned", "transformers"])
@pytest.mark.parametrize("tokens", [1, 50])
def test_other_places_are_used_once_loaded(how: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = build(FourierFTBiasedConfig(n_frequency=9, init_weights=False), 12, 20)
    other = torch.tensor([0, 3, 10, 40, 77, 120, 131, 200, 239], dtype=torch.int32)
    assert not torch.equal(other, adapter.positions)
    loaded(adapter, other, how)
    monkeypatch.setattr(fourierft, "fold", lambda *_: pytest.fail("folded again"))
    x = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    delta = reference.delta_weight(adapter.spectrum, other, (12, 20), 150.0)
    values = (adapter(x), adapter.delta_weight(), adapter.rows(torch.tensor([0, 11])))
    wanted = (nn.functional.linear(x, delta), delta, delta[[0, 11]])
    torch.testing.assert_close(values, wanted)
    for one, expected in zip(values, wanted, strict=True):
        sources = (x, adapter.spectrum) if one is values[0] else (adapter.spectrum,)
        got, right = (torch.autograd.grad(y.square().sum(), sources, retain_graph=True) for y in (one, expected))
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_other_places_are_used_inside_a_layer() -> None:
    layer = AdaptedLayer(nn.Linear(20, 12).requires_grad_(False))
    layer.add("a", build(FourierFTBiasedConfig(n_frequency=9, init_weights=False), 12, 20))
    layer.set_active({"a": 1.0})
    adapter = layer.adapters["a"]
    assert isinstance(adapter, FourierFT)
    loaded(adapter, torch.arange(9, dtype=torch.int32), "copied")
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + nn.functional.linear(x, adapter.delta_weight()))


def test_places_of_an_adapter_built_without_numbers_are_folded_when_they_come() -> None:
    adapter = build(FourierFTBiasedConfig(n_frequency=9, init_weights=False), 12, 20)
    with torch.device("meta"):
        hollow = build(FourierFTBiasedConfig(n_frequency=9), 12, 20)
    hollow.to_empty(device="cpu").load_state_dict(adapter.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(hollow(x), adapter(x))


def test_auto_scaling_is_that_of_fourierft() -> None:
    shapes = [(12, 20), (40, 20)]
    biased = METHODS["fourierft_biased"].resolve(FourierFTBiasedConfig(n_frequency=9, scaling="auto"), shapes)
    plain = METHODS["fourierft"].resolve(FourierFTConfig(n_frequency=9, scaling="auto"), shapes)
    assert biased.scaling == plain.scaling
    assert biased == FourierFTBiasedConfig(n_frequency=9, scaling=biased.scaling)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_frequency": 0}, "n_frequency: expected 1 to 122 for a layer of 12 x 20, got 0"),
        ({"n_frequency": -1}, "n_frequency: expected 1 to 122 .* got -1"),
        ({"n_frequency": 123}, "n_frequency: expected 1 to 122 .* got 123"),
        ({"scaling": "auto"}, "scaling: expected a number here, got 'auto'.* Use the method's resolve"),
        ({"center_frequency": -0.1}, r"center_frequency: expected 0 or more, got -0\.1"),
        ({"bandwidth": 0.0}, r"bandwidth: expected above 0, got 0.*Use 0\.26"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(FourierFTBiasedConfig(**{"n_frequency": 9, **changes}), 12, 20)
