"""The laws of every row of METHODS: a new method is covered once its small settings are listed here."""

from __future__ import annotations

import copy
import pickle
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import Adapter, AdapterSpec, AdapterState
from spectral_surgery.adapters.foura import FouraConfig
from spectral_surgery.adapters.fourierft import FourierFTConfig
from spectral_surgery.adapters.fourierft_biased import FourierFTBiasedConfig
from spectral_surgery.adapters.layer import AdaptedLayer
from spectral_surgery.adapters.lora import LoraConfig
from spectral_surgery.adapters.spectral_delta import SpectralDeltaConfig
from spectral_surgery.errors import CheckpointError, NotMergeableError


@dataclass(frozen=True)
class Case:
    """A method with settings that fit small layers."""

    method: str
    config: Any
    name: str = ""
    scale: float = 1.0

    def fresh(self, rows: int, columns: int) -> nn.Module:
        adapter = METHODS[self.method].build(self.config, rows, columns)
        assert isinstance(adapter, Adapter)
        return adapter

    def trained(self, rows: int, columns: int, seed: int = 0) -> nn.Module:
        adapter = self.fresh(rows, columns)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.scale)
        return adapter


DYNAMIC = Case("foura", FouraConfig(r=3, use_gate=True), "foura-gate", scale=0.5)  # some components are open
SPARSE = Case("spectral_delta", SpectralDeltaConfig(n_frequency=17), "spectral_delta-dct")
MERGEABLE = [
    Case("fourierft", FourierFTConfig(n_frequency=17, scaling=30.0), "fourierft"),
    Case("fourierft_biased", FourierFTBiasedConfig(n_frequency=17, scaling=30.0), "fourierft_biased"),
    *[Case("foura", FouraConfig(r=3, transform=name), f"foura-{name}") for name in ("dct", "hartley", "dft")],
    SPARSE,
    Case("spectral_delta", SpectralDeltaConfig(n_frequency=17, transform="hartley"), "spectral_delta-hartley"),
    Case("lora", LoraConfig(r=3), "lora"),
]
ALL = [*MERGEABLE, DYNAMIC]
SHAPES = [(12, 20), (21, 7), (9, 9)]
TOKENS = [(1,), (2, 3), (40,), (3, 0)]


def cases(some: list[Case]) -> Any:
    return pytest.mark.parametrize("case", some, ids=lambda case: case.name)


def signal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_method_is_under_the_laws() -> None:
    assert {case.method for case in ALL} == set(METHODS)


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_settings_are_frozen_documented_and_have_defaults(row: Any) -> None:
    assert is_dataclass(row.config)
    assert row.config.__dataclass_params__.frozen
    for item in fields(row.config):
        assert item.metadata["help"].endswith("."), item.name
        assert item.default is not MISSING or item.default_factory is not MISSING, item.name
    assert row.peft_type == row.name.upper()
    assert row.source


@cases(ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_adapter_changes_nothing(case: Case, shape: tuple[int, int]) -> None:
    base = nn.Linear(shape[1], shape[0])
    layer = AdaptedLayer(base)
    layer.adapters["a"] = case.fresh(*shape)
    layer.set_active({"a": 1.0})
    for tokens in TOKENS:
        x = signal(*tokens, shape[1])
        assert torch.equal(layer(x), base(x))


@cases(MERGEABLE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward_and_gradients_are_those_of_the_weight_update(
    case: Case, shape: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    adapter = case.trained(*shape)
    parameters = list(adapter.parameters())
    x = signal(*tokens, shape[1]).requires_grad_()
    g = signal(*tokens, shape[0], seed=2)
    delta = adapter.delta_weight()
    assert delta.shape == shape
    assert delta.dtype == torch.float32
    y, expected = adapter(x), nn.functional.linear(x, delta)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    actual = torch.autograd.grad((y * g).sum(), [x, *parameters])
    wanted = torch.autograd.grad((expected * g).sum(), [x, *parameters])
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-4)


@cases(ALL)
@pytest.mark.parametrize("tokens", [(2,), (40,)])
def test_gradients_reach_every_parameter(case: Case, tokens: tuple[int, ...]) -> None:
    adapter = case.trained(12, 20)
    x = signal(*tokens, 20).requires_grad_()
    (adapter(x) * signal(*tokens, 12, seed=2)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


@cases(ALL)
def test_a_fresh_adapter_can_learn(case: Case) -> None:
    adapter = case.fresh(12, 20)
    (adapter(signal(40, 20)) * signal(40, 12, seed=2)).sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in adapter.parameters() if parameter.grad is not None)


@cases(MERGEABLE)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_rows_of_the_weight_update(case: Case, shape: tuple[int, int]) -> None:
    adapter = case.trained(*shape)
    for ids in (torch.tensor(3), torch.tensor([0, shape[0] - 1, 3, 3]), torch.arange(shape[0]).repeat(4, 1)):
        rows = adapter.rows(ids)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, adapter.delta_weight()[ids], rtol=1e-4, atol=1e-5)
    adapter.rows(torch.tensor([1, 2])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())


@cases(ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [2, 40])
def test_activations_keep_their_dtype(case: Case, dtype: torch.dtype, tokens: int) -> None:
    adapter = case.trained(12, 20).eval()
    x = signal(tokens, 20).to(dtype)
    y = adapter(x)
    assert y.dtype == dtype
    assert torch.equal(y, adapter(x.float()).to(dtype))  # computed in float32, rounded once


@cases(ALL)
@pytest.mark.parametrize("tokens", [2, 40])
def test_autocast(case: Case, tokens: int) -> None:
    adapter = case.trained(12, 20).eval()
    x = signal(tokens, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.float32
    assert (y - adapter(x)).norm() < (0.05 if case is not DYNAMIC else 1.0) * y.norm()  # a gate may switch
    y.sum().backward()


@cases(ALL)
def test_inputs_may_be_strided(case: Case) -> None:
    adapter = case.trained(12, 20).eval()
    x = signal(20, 5, 2).permute(1, 2, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(adapter(x), adapter(x.contiguous()))


@cases(ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_state_round_trip(case: Case, shape: tuple[int, int]) -> None:
    adapter = case.trained(*shape)
    adapter(signal(50, shape[1]))
    stored = {key: value.clone() for key, value in adapter.state_dict().items()}
    state = AdapterState(AdapterSpec(METHODS[case.method], case.config), {"layer": stored})
    again = state.build("layer", *shape)
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in stored.items()}
    assert all(torch.equal(value, stored[key]) for key, value in again.state_dict().items())
    x = signal(5, shape[1], seed=3)
    assert torch.equal(again.eval()(x), adapter.eval()(x))
    with pytest.raises(CheckpointError, match="Use the base model it was made for"):
        AdapterState(state.spec, {"layer": {}}).build("layer", *shape)


@cases(ALL)
def test_positions_and_numbers_are_the_same_each_time(case: Case) -> None:
    torch.manual_seed(0)
    first = case.fresh(12, 20)
    torch.manual_seed(0)
    second = case.fresh(12, 20)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@cases(ALL)
def test_a_copy_is_independent(case: Case) -> None:
    adapter = case.trained(12, 20).eval()
    x = signal(5, 20)
    before = adapter(x)
    twin = copy.deepcopy(adapter)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(adapter(x), before)
    assert not torch.equal(twin(x), before)


@cases(ALL)
def test_pickles(case: Case) -> None:
    adapter = case.trained(12, 20).eval()
    x = signal(5, 20)
    assert torch.equal(pickle.loads(pickle.dumps(adapter))(x), adapter(x))


@cases([*MERGEABLE[:2], DYNAMIC, SPARSE])
def test_compiles_in_one_graph(case: Case) -> None:
    adapter = case.trained(12, 20)
    x = signal(5, 20).requires_grad_()
    expected = adapter(x)
    y = torch.compile(adapter, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected.sum(), [x, *adapter.parameters()])
    for one, other in zip(torch.autograd.grad(y.sum(), [x, *adapter.parameters()]), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@cases(ALL)
def test_patterns_give_layers_settings_of_their_own(case: Case) -> None:
    targets = {"n_frequency_pattern": "n_frequency", "rank_pattern": "r", "alpha_pattern": "alpha"}
    if case.method == "lora":
        targets["alpha_pattern"] = "lora_alpha"
    patterns = [item.name for item in fields(case.config) if item.name.endswith("_pattern")]
    assert patterns
    for pattern in patterns:
        config = replace(case.config, **{pattern: {r"layers\.1\..*": 2}})
        other = config.for_layer("model.layers.0.q")
        assert getattr(other, targets[pattern]) == getattr(case.config, targets[pattern])
        own = config.for_layer("model.layers.1.q")
        assert getattr(own, targets[pattern]) == 2
        assert getattr(own, pattern) == {}
        spec = AdapterSpec(METHODS[case.method], config)
        if pattern != "alpha_pattern":
            sizes = [sum(p.numel() for p in spec.build(f"layers.{i}.q", 12, 20).parameters()) for i in (0, 1)]
            assert sizes[1] < sizes[0]


@cases(MERGEABLE)
def test_convolutions_and_embeddings(case: Case) -> None:
    conv = AdaptedLayer(nn.Conv2d(3, 8, 3, padding=1))
    conv.adapters["a"] = case.trained(*conv.shape)
    conv.set_active({"a": 1.0})
    x = signal(2, 3, 5, 5)
    delta = conv.adapters["a"].delta_weight().reshape(8, 3, 3, 3)
    expected = conv.base_layer(x) + torch.conv2d(x, delta, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
    table = AdaptedLayer(nn.Embedding(30, 10))
    table.adapters["a"] = case.trained(*table.shape)
    table.set_active({"a": 0.5})
    ids = torch.tensor([[0, 3], [29, 3]])
    expected = table.base_layer(ids) + 0.5 * table.adapters["a"].delta_weight()[ids]
    torch.testing.assert_close(table(ids), expected, rtol=1e-4, atol=1e-5)


def test_a_dynamic_gate_has_no_weight_update() -> None:
    adapter = DYNAMIC.trained(12, 20)
    for attempt in (adapter.delta_weight, lambda: adapter.rows(torch.tensor([0])), adapter.lora_factors):
        with pytest.raises(NotMergeableError, match=r"got one that depends on the input, so no one.*Call"):
            attempt()
