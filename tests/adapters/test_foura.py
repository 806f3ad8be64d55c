"""FouRA against its definition, its gate, and its form as a LoRA."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS, foura, one_token
from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.foura import Foura, FouraConfig
from spectral_surgery.adapters.lora import Lora, LoraConfig
from spectral_surgery.adapters.rank_gate import RankGate
from spectral_surgery.errors import ConfigError, NotMergeableError
from spectral_surgery.transforms import TRANSFORMS
from tests.support.largest import largest_tensor
from tests.support.spectra import TOLERANCE, relative

GATED = FouraConfig(r=4, use_gate=True)


def signal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(config: FouraConfig, rows: int, columns: int) -> Foura:
    adapter = Foura(config, rows, columns)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(adapter.named_parameters()):
            parameter.copy_((1.5 if "gate" in name else 0.5) * signal(*parameter.shape, seed=seed))
    return adapter


@pytest.mark.parametrize("shape", [(12, 20), (21, 7), (9, 9)])
@pytest.mark.parametrize("name", ["dct", "hartley"])
def test_the_update_is_a_product_in_the_transform_domain(name: Any, shape: tuple[int, int]) -> None:
    adapter = trained(FouraConfig(r=3, alpha=6.0, transform=name), *shape)
    out, into = (TRANSFORMS[name].matrix(n).float() for n in shape)
    torch.testing.assert_close(adapter.delta_weight(), 2 * out.T @ adapter.B @ adapter.A @ into)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 3 * sum(shape)


@pytest.mark.parametrize("shape", [(12, 20), (21, 7), (9, 9)])
def test_the_update_with_complex_factors(shape: tuple[int, int]) -> None:
    adapter = trained(FouraConfig(r=3, alpha=6.0, transform="dft"), *shape)
    a, b = torch.view_as_complex(adapter.A), torch.view_as_complex(adapter.B)
    spectrum = torch.fft.rfft(torch.eye(shape[1]), norm="ortho") @ a.T @ b.T  # of each unit vector
    torch.testing.assert_close(adapter.delta_weight(), 2 * torch.fft.irfft(spectrum, n=shape[0], norm="ortho").T)
    bins = sum(n // 2 + 1 for n in shape)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 2 * 3 * bins
    assert torch.linalg.matrix_rank(adapter.delta_weight()) == 6


@pytest.mark.parametrize("config", [GATED, replace(GATED, use_gate=False), FouraConfig(r=3, transform="dft")])
def test_a_lora_with_the_same_function(config: FouraConfig) -> None:
    adapter = trained(config, 12, 20)
    adapter(signal(60, 20))
    adapter.freeze_gate()
    down, up = adapter.lora_factors()
    assert down.dtype == up.dtype == torch.float32
    lora = Lora(LoraConfig(r=len(down), lora_alpha=len(down)), 12, 20)
    lora.load_state_dict({"A": down.detach(), "B": up.detach()})
    x = signal(2, 30, 20)
    torch.testing.assert_close(lora(x), adapter.eval()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.delta_weight(), adapter.delta_weight(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(12, 20), (21, 7), (9, 9), (2, 47), (64, 45), (53, 12), (12, 118)])
@pytest.mark.parametrize("name", ["dct", "hartley", "dft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_is_one_call_without_gradients(name: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    adapter = trained(FouraConfig(r=1 if 2 in shape else 3, transform=name), *shape)
    x = signal(1, 1, shape[1]).to(dtype)
    expected = (x.double() @ adapter.delta_weight().double().T).detach()
    calls = Counter[bool]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foura, "update", lambda *given, **more: counted(calls, one_token.update(*given, **more)))
        with torch.no_grad():
            y = adapter(x)
        assert dict(calls) == {name != "dft" and max(shape) != 118 and 53 not in shape: 1}  # 59 and 53 are large primes
        assert adapter(x).requires_grad
    assert (y.shape, y.dtype) == ((1, 1, shape[0]), dtype)
    assert relative(y, expected) < TOLERANCE[dtype]
    given = x.float().requires_grad_()
    (gradient,) = torch.autograd.grad(adapter(given).sum(), given)
    assert relative(gradient, adapter.delta_weight().detach().sum(0).expand_as(gradient)) < 1e-5


def counted(calls: Counter[bool], y: Tensor | None) -> Tensor | None:
    calls[y is not None] += 1
    return y


@pytest.mark.parametrize("name", ["dct", "dft"])
def test_one_token_through_gates_and_transformed_functions(name: Any) -> None:
    adapter = trained(replace(GATED, transform=name), 12, 20)
    x = signal(60, 20)
    with torch.no_grad():
        for module in (adapter, frozen(adapter, x)):
            many = module.eval()(x)
            one = torch.stack([module(token) for token in x])
            torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.vmap(module)(x), many, rtol=1e-5, atol=1e-5)
        assert not frozen(adapter, x).gate.frozen_mask.all()


def frozen(adapter: Foura, x: Tensor) -> Foura:
    adapter.train()(x)
    adapter.freeze_gate()
    return adapter


def test_a_fresh_gate_is_open() -> None:
    adapter = Foura(GATED, 12, 20)
    plain = Foura(replace(GATED, use_gate=False), 12, 20)
    with torch.no_grad():
        adapter.B.copy_(signal(12, 4))
    plain.load_state_dict({"A": adapter.A, "B": adapter.B})
    x = signal(2, 30, 20)
    assert torch.equal(adapter(x), plain(x))


@pytest.mark.parametrize("name", ["dct", "dft"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_later_token_does_not_change_earlier_outputs(name: Any, tokens: int) -> None:
    adapter = trained(replace(GATED, transform=name), 12, 20)
    x = signal(1, tokens, 20)
    now = tokens // 2
    other = x.clone()
    other[:, now:] = 5 * signal(1, tokens - now, 20, seed=9)
    for module in (adapter.train(), adapter.eval()):
        y, changed = module(x), module(other)
        assert y[:, :now].any()
        assert torch.equal(y[:, :now], changed[:, :now])
        assert not torch.equal(y[:, now:], changed[:, now:])


def test_tokens_choose_components() -> None:
    adapter = trained(GATED, 12, 20)
    assert adapter.gate is not None
    magnitudes = signal(50, 4).abs()
    mask = adapter.gate(magnitudes)
    assert set(mask.unique().tolist()) == {0.0, 1.0}  # exactly, and both
    assert len(mask.unique(dim=0)) > 1
    assert torch.equal(adapter.gate(magnitudes[7:8]), mask[7:8])


def test_the_gradient_of_the_gate_is_that_of_its_surrogate() -> None:
    gate = RankGate(3, threshold=0.4, sharpness=2.0).double()
    with torch.no_grad():
        for seed, parameter in enumerate(gate.parameters()):
            parameter.copy_(signal(*parameter.shape, seed=seed))
    magnitudes = signal(5, 3).abs().double()

    def surrogate() -> Tensor:
        p = gate.logits(nn.functional.silu(gate.hidden(magnitudes))).softmax(-1)
        return (2.0 * (-p * p.log() / (torch.tensor(3.0).double().log() / 3) - 0.4)).sigmoid()

    weights = signal(5, 3, seed=7).double()
    parameters = list(gate.parameters())
    actual = torch.autograd.grad((gate(magnitudes) * weights).sum(), parameters)
    expected = torch.autograd.grad((surrogate() * weights).sum(), parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(gate(magnitudes), (surrogate() > 0.5).double())


def test_the_gate_survives_extreme_tokens() -> None:
    adapter = trained(replace(GATED, transform="dft"), 12, 20)
    x = torch.stack([torch.zeros(20), torch.full((20,), 1e4)]).requires_grad_()
    adapter(x).sum().backward()
    for tensor in (x, *adapter.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_freezing_keeps_what_most_tokens_opened() -> None:
    adapter = trained(GATED, 12, 20)
    assert adapter.gate is not None
    seen = []
    adapter.gate.register_forward_hook(lambda _module, _inputs, mask: seen.append(mask.reshape(-1, 4)))
    for seed in range(5):
        adapter(signal(2, 10, 20, seed=seed))
    adapter.eval()(signal(2, 10, 20, seed=9))  # observed in training mode only
    rate = torch.cat(seen[:5]).mean(0)
    torch.testing.assert_close(adapter.gate.rate, rate.detach())
    assert adapter.gate.seen == 100
    adapter.freeze_gate()
    expected = (rate > 0.5).float()
    assert 0 < expected.sum() < 4
    x = signal(7, 20)
    assert torch.equal(adapter.gate(x[:, :4]), expected)
    torch.testing.assert_close(adapter(x), x @ adapter.delta_weight().T, rtol=1e-5, atol=1e-5)
    kept = adapter.gate.frozen_mask.clone()
    adapter.train()(100 * signal(50, 20))
    adapter.freeze_gate()
    assert torch.equal(adapter.gate.frozen_mask, kept)


def test_statistics_forget_slowly() -> None:
    gate = RankGate(2, 0.5, 4.0)
    gate(torch.ones(1000, 2))
    with torch.no_grad():
        gate.logits.bias.copy_(torch.tensor([30.0, 0.0]))  # all closed
    gate(torch.ones(1, 2))
    torch.testing.assert_close(gate.rate, torch.full((2,), 0.99))
    gate(torch.ones(0, 2))
    torch.testing.assert_close(gate.rate, torch.full((2,), 0.99))


def test_a_frozen_gate_is_stored() -> None:
    adapter = trained(GATED, 12, 20)
    adapter(signal(60, 20))
    adapter.freeze_gate()
    state = AdapterState(AdapterSpec(METHODS["foura"], GATED), {"layer": adapter.state_dict()})
    again = state.build("layer", 12, 20)
    assert torch.equal(again.delta_weight(), adapter.delta_weight())
    parent = nn.ModuleDict({"a": Foura(GATED, 12, 20)})
    parent.load_state_dict({f"a.{key}": value for key, value in adapter.state_dict().items()})
    assert torch.equal(parent["a"].delta_weight(), adapter.delta_weight())
    dynamic = trained(GATED, 12, 20)
    parent["a"].load_state_dict(dynamic.state_dict())
    with pytest.raises(NotMergeableError, match=r"Call freeze_gate\(\)"):
        parent["a"].delta_weight()


def test_freezing_needs_tokens() -> None:
    with pytest.raises(
        ConfigError, match=r"freeze_gate: expected a gate that has seen tokens, got none. .* training mode first"
    ):
        Foura(GATED, 12, 20).freeze_gate()


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("config", [GATED, FouraConfig(r=4), FouraConfig(r=4, transform="dft")])
def test_no_dense_projection(config: FouraConfig, tokens: int) -> None:
    adapter = trained(config, 64, 96)
    x = signal(tokens, 96).requires_grad_()
    with largest_tensor() as most:
        adapter(x).sum().backward()
    assert most.numel < 64 * 96


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 0}, "r 0: expected 1 to 12 for dct and a layer of 12 x 20"),
        ({"r": 13}, "r 13: expected 1 to 12 .* Change r, or rank_pattern"),
        ({"r": 7, "transform": "dft"}, "r 7: expected 1 to 6 for dft"),
        ({"transform": "haar"}, "transform: expected one of dct, hartley, dft, got 'haar'"),
        ({"use_gate": True, "r": 1}, "use_gate: expected r of 2 or more, got 1: nothing to choose between"),
        ({"use_gate": True, "gate_threshold": 1.0}, "gate_threshold: expected above 0 and below 1, where.*got 1"),
        ({"use_gate": True, "gate_sharpness": 0.0}, "gate_sharpness: expected above 0, got 0"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Foura(FouraConfig(**changes), 12, 20)
