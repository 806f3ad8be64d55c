"""FourierFT on a linear layer: PEFT's places, the fused output, and when the base must be called instead."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters.fourierft import FourierFT, FourierFTConfig, auto_scaling, random_positions
from spectral_surgery.adapters.layer import AdaptedLayer
from spectral_surgery.errors import ConfigError
from spectral_surgery.fourier import reference

CONFIG = FourierFTConfig(n_frequency=50, scaling=30.0, init_weights=False)


def layer(rows: int = 40, columns: int = 24, dtype: torch.dtype = torch.float32) -> AdaptedLayer:
    torch.manual_seed(0)
    adapted = AdaptedLayer(nn.Linear(columns, rows, dtype=dtype).requires_grad_(False))
    adapted.add("default", FourierFT(CONFIG, rows, columns))
    adapted.set_active({"default": 1.0})
    return adapted


def signal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def expected(adapted: AdaptedLayer, x: Tensor) -> Tensor:
    adapter = adapted.adapters["default"]
    assert isinstance(adapter, FourierFT)
    delta = reference.delta_weight(adapter.spectrum, adapter.positions, adapter.shape, adapter.scaling)
    return nn.functional.linear(x, adapted.weight.float() + delta, adapted.bias.float())


def test_places_are_those_peft_draws_and_are_drawn_once() -> None:
    generator = torch.Generator().manual_seed(777)
    drawn = torch.randperm(960, generator=generator)[:50]
    assert torch.equal(random_positions(960, 50, 777), drawn)
    assert random_positions(960, 50, 777) is random_positions(960, 50, 777)
    first, second = (FourierFT(CONFIG, 40, 24) for _ in range(2))
    assert first._indices.data_ptr() == second._indices.data_ptr()
    assert first.state_dict().keys() == {"spectrum"}


def test_built_on_any_device() -> None:
    with torch.device("meta"):
        adapter = FourierFT(CONFIG, 40, 24)
    assert adapter.spectrum.is_meta
    assert torch.equal(adapter.positions, FourierFT(CONFIG, 40, 24).positions)


@pytest.mark.parametrize("leading", [(1,), (5,), (1, 1), (2, 3), (200,)], ids=str)
def test_output_and_gradients_of_the_layer(leading: tuple[int, ...]) -> None:
    adapted, x = layer(), signal(*leading, 24).requires_grad_()
    c = adapted.adapters["default"].spectrum
    y, wanted = adapted(x), expected(adapted, x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    grads, others = (torch.autograd.grad(out.square().sum(), (x, c)) for out in (y, wanted))
    torch.testing.assert_close(grads, others, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(adapted(x), wanted, rtol=1e-5, atol=1e-5)


def test_coefficients_changed_between_calls_are_seen() -> None:
    adapted, x = layer(), signal(1, 24)
    with torch.no_grad():
        before = adapted(x)
        adapted.adapters["default"].spectrum.data.mul_(2)
        twice = adapted(x)
        base = adapted.base_layer(x)
    torch.testing.assert_close(twice - base, 2 * (before - base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 6])
def test_half_precision_and_autocast(tokens: int) -> None:
    adapted, x = layer(dtype=torch.bfloat16), signal(tokens, 24).bfloat16()
    for inference in (False, True):
        with torch.inference_mode(inference):
            y = adapted(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected(adapted, x.float()), rtol=2e-2, atol=2e-2)
    wide = layer()
    assert wide.adapters["default"].fused_linear(x, wide.weight, wide.bias) is None
    with torch.autocast("cpu", torch.bfloat16):
        y = wide(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected(wide, x.float()), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert wide.adapters["default"].spectrum.grad is not None


def test_a_base_that_is_observed_is_called() -> None:
    adapted, x, seen = layer(), signal(3, 24), []
    fused = adapted(x)
    handle = adapted.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(adapted(x), fused)
    handle.remove()
    handle = adapted.base_layer.register_forward_pre_hook(lambda *_: seen.append(1))
    adapted(x)
    handle.remove()
    own = adapted.base_layer.forward
    adapted.base_layer.forward = lambda *a: seen.append(1) or own(*a)
    adapted(x)
    assert seen == [1, 1, 1]


def test_copied_pickled_and_moved() -> None:
    adapted, x = layer(), signal(1, 24)
    with torch.no_grad():
        y = adapted(x)
        twin = copy.deepcopy(adapted)
        torch.testing.assert_close(twin(x), y)
        buffer = io.BytesIO()
        torch.save(twin, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), y)
        torch.testing.assert_close(adapted.double()(x.double()).float(), y, rtol=1e-5, atol=1e-5)


def test_merging_sees_float64() -> None:
    adapter = FourierFT(CONFIG, 40, 24).double()
    exact = reference.delta_weight(adapter.spectrum.detach(), adapter.positions, (40, 24), 30.0)
    assert adapter.delta_weight().dtype == torch.float64
    torch.testing.assert_close(adapter.delta_weight().detach(), exact, rtol=1e-12, atol=1e-14)


def test_rows_are_rows_of_the_update() -> None:
    adapter, ids = FourierFT(CONFIG, 40, 24), torch.tensor([[3, 39], [0, 3]])
    torch.testing.assert_close(adapter.rows(ids), adapter.delta_weight()[ids])


@pytest.mark.parametrize("count", [0, -1, 961])
def test_counts_that_do_not_fit(count: int) -> None:
    with pytest.raises(ConfigError, match=f"n_frequency: expected 1 to 960 for a layer of 40 x 24, got {count}"):
        FourierFT(FourierFTConfig(n_frequency=count), 40, 24)


def test_scaling_must_be_resolved() -> None:
    config = FourierFTConfig(n_frequency=50, scaling="auto")
    with pytest.raises(ConfigError, match="scaling: expected a number here, got 'auto'"):
        FourierFT(config, 40, 24)
    resolved = auto_scaling(config, [(40, 24)])
    torch.manual_seed(0)
    spread = FourierFT(auto_scaling(FourierFTConfig(50, "auto", init_weights=False), [(40, 24)]), 40, 24)
    assert float(spread.delta_weight().detach().std()) == pytest.approx(3e-3, rel=0.3)
    assert auto_scaling(resolved, [(1, 1)]) is resolved
