"""Adapters on live models: what is wrapped, what is trained, and that taking them off leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.fourierft import FourierFTConfig
from spectral_surgery.adapters.layer import AdaptedLayer
from spectral_surgery.adapters.lora import LoraConfig
from spectral_surgery.errors import CheckpointError, ConfigError, TargetError
from spectral_surgery.live import attach
from spectral_surgery.live.choose_targets import candidates, resolve
from spectral_surgery.targets import ModuleTargets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.v_proj(self.q_proj(x).tanh()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.score = nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(True)


IDS = torch.arange(5)[None]


def lora(*targets: str, **fields: object) -> AdapterSpec:
    return AdapterSpec(METHODS["lora"], LoraConfig(r=2), ModuleTargets(targets or None, **fields))


def stir(model: nn.Module, seed: int = 1) -> None:
    """Random numbers in everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(model: Model) -> None:
    before = model(IDS)
    attach.inject(model, lora())
    assert torch.equal(model(IDS), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".adapters.default." in name for name in trained)
    assert attach.trainable_parameters(model) == (4 * 2 * 12, sum(p.numel() for p in model.parameters()))


def test_usual_targets_are_found(model: Model) -> None:
    spec = attach.inject(model, lora())
    assert spec.targets.target_modules == ("q_proj", "v_proj")
    assert sorted(attach.adapted_layers(model)) == [f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")]


def test_all_linear_leaves_out_the_head_and_lists_what_it_took(model: Model) -> None:
    spec = resolve(model, AdapterSpec(METHODS["lora"], LoraConfig(), ModuleTargets("all-linear")))
    assert spec.targets.target_modules == tuple(f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj"))


def test_no_usual_names_asks_for_targets() -> None:
    with pytest.raises(TargetError, match=r"expected ends of names.*no usual names .* Use --target-modules"):
        attach.inject(nn.Sequential(nn.Linear(3, 3)), lora())


def test_nothing_matched_is_an_error_and_changes_nothing(model: Model) -> None:
    with pytest.raises(TargetError, match=r"target_modules:.*got \('nope',\), which matches none of 6 modules"):
        attach.inject(model, lora("nope"))
    assert not attach.adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_setting_that_fits_no_layer_puts_nothing_on(model: Model) -> None:
    spec = AdapterSpec(METHODS["fourierft"], FourierFTConfig(n_frequency=36), ModuleTargets(("q_proj", "score")))
    with pytest.raises(ConfigError, match=r"n_frequency: expected 1 to 12 .* got 36"):
        attach.inject(model, spec)
    assert not attach.adapted_layers(model)


def test_detach_gives_back_the_same_modules_and_bits(model: Model) -> None:
    before, modules = bits(model), dict(model.named_modules())
    attach.inject(model, lora("q_proj", "embed", bias="all", modules_to_save=("score",)))
    attach.inject(model, lora("v_proj", "q_proj", bias="lora_only"), "second")
    stir(model)
    attach.detach(model, "default")
    assert attach.adapter_names(model) == ["second"]
    attach.detach(model)
    assert same_bits(bits(model), before)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_disabled_is_the_base_and_comes_back(model: Model) -> None:
    before = model(IDS)
    attach.inject(model, lora("q_proj", bias="all", modules_to_save=("score",)))
    stir(model)
    after = model(IDS)
    with attach.disabled(model):
        assert torch.equal(model(IDS), before)
    assert torch.equal(model(IDS), after)
    assert not torch.equal(after, before)


def test_weights_add_adapters_up(model: Model) -> None:
    attach.inject(model, lora("q_proj"), "a")
    attach.inject(model, lora("q_proj"), "b")
    attach.set_active(model, {"a": 0.5, "b": 2.0})
    stir(model)
    layer = model.layers[0].q_proj
    assert isinstance(layer, AdaptedLayer)
    x = torch.randn(3, 6)
    delta = 0.5 * layer.adapters["a"].delta_weight() + 2 * layer.adapters["b"].delta_weight()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)
    attach.set_active(model, {})
    assert torch.equal(layer(x), layer.base_layer(x))


def test_unknown_names_are_errors(model: Model) -> None:
    attach.inject(model, lora())
    text = r"adapter: expected one of this model \(default\), got 'x'"
    with pytest.raises(ConfigError, match=text):
        attach.set_active(model, {"x": 1.0})
    with pytest.raises(ConfigError, match=text):
        attach.detach(model, "x")
    with pytest.raises(ConfigError, match=r"adapter: expected one of this model .*, got 'x'"):
        attach.state_of(model, lora(), "x")
    with pytest.raises(ConfigError, match="adapter: expected a new name, got 'default'"):
        attach.inject(model, lora())
    with pytest.raises(ConfigError, match=r"adapter name: expected letters, digits, - and _, got 'a\.b'"):
        attach.inject(model, lora(), "a.b")


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_state_goes_to_another_copy_of_the_base(model: Model, bias: str) -> None:
    other = copy.deepcopy(model)
    spec = attach.inject(model, lora("q_proj", "embed", bias=bias, modules_to_save=("score",)))
    stir(model)
    state = attach.state_of(model, spec)
    attach.load(other, state)
    assert torch.equal(other(IDS), model(IDS))
    named = set(state.extra)
    assert {"score.weight", "score.bias"} <= named
    assert ("layers.0.q_proj.base_layer.bias" in named) == (bias != "none")
    assert ("layers.0.norm.bias" in named) == (bias == "all")


def test_an_adapter_of_another_model_lists_every_mismatch_and_changes_nothing(model: Model) -> None:
    spec = attach.inject(model, lora("q_proj", "v_proj", "score"))
    state = attach.state_of(model, spec)
    other = Model()
    other.score = nn.Linear(6, 3)
    other.layers = other.layers[:1]
    with pytest.raises(CheckpointError, match=r"adapter.*got \{'A': \(2, 6\), 'B': \(2, 2\)\} in the adapter"):
        attach.load(other, state)
    assert not attach.adapted_layers(other)


def test_missing_extras_are_listed_and_the_model_is_left_as_it_was(model: Model) -> None:
    other = copy.deepcopy(model)
    state = attach.state_of(model, attach.inject(model, lora("q_proj", modules_to_save=("score",))))
    del state.extra["score.bias"]
    state.extra["stray"] = torch.zeros(1)
    before = bits(other)
    with pytest.raises(CheckpointError, match=r"score\.bias is missing; stray is not expected"):
        attach.load(other, state)
    assert same_bits(bits(other), before)
    assert all(p.requires_grad for p in other.parameters())


def test_modules_to_save_that_are_not_there(model: Model) -> None:
    with pytest.raises(TargetError, match=r"modules_to_save: expected .* got \['head'\], which are not in"):
        attach.inject(model, lora(modules_to_save=("head",)))
    assert not attach.adapted_layers(model)


def test_a_saved_module_trains_its_copy_not_the_original(model: Model) -> None:
    original = model.score.weight
    attach.inject(model, lora("q_proj", modules_to_save=("score",)))
    model(IDS).sum().backward()
    assert original.grad is None
    assert model.score.weight.grad is not None


def test_adapted_modules_can_carry_more(model: Model) -> None:
    attach.inject(model, lora("q_proj"), "a")
    attach.inject(model, lora("q_proj"), "b")
    assert [name for name, _ in candidates(model) if "q_proj" in name] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert list(attach.adapted_layers(model)["layers.0.q_proj"].adapters) == ["a", "b"]


def test_convolutions_and_embeddings(model: Model) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"))
    spec = AdapterSpec(METHODS["lora"], LoraConfig(r=2), ModuleTargets(("0",)))
    attach.inject(net, spec)
    stir(net)
    net.double()  # convolutions in float32 differ in the fifth digit from one processor to the next
    layer = net[0]
    assert isinstance(layer, AdaptedLayer)
    merged = copy.deepcopy(layer.base_layer)
    merged.weight.data += layer.adapters["default"].delta_weight().reshape(merged.weight.shape)
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), merged(x))
    attach.inject(model, lora("embed"))
    stir(model)
    layer = model.embed
    table = layer.base_layer.weight + layer.adapters["default"].delta_weight()
    torch.testing.assert_close(layer(IDS), table[IDS])


def test_a_module_that_cannot_carry_an_adapter() -> None:
    with pytest.raises(ConfigError, match=r"target_modules: expected.*got LayerNorm, which cannot carry an adapter"):
        AdaptedLayer(nn.LayerNorm(3))


def test_a_layer_says_which_adapters_it_has(model: Model) -> None:
    attach.inject(model, lora("q_proj"))
    with pytest.raises(ConfigError, match=r"adapter: expected one of this layer \(default\), got 'x'"):
        attach.adapted_layers(model)["layers.0.q_proj"].set_active({"x": 1.0})
