"""Products that are recorded equal those that are run, for every form, basis and shape, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.errors import ConfigError
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralExperts, SpectralLinear, SpectralWeight
from spectral_surgery.matmul import recorded
from tests.support.spectra import TOLERANCE, noise, random_codes, relative

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda layer, x: torch.export.export(layer, (x,), strict=False).module(),
    "trace": torch.jit.trace,
    "eager": lambda layer, _: torch.compile(layer, backend="eager", fullgraph=True),
    "aot_eager": lambda layer, _: torch.compile(layer, backend="aot_eager", fullgraph=True),
}


def spectra(*, rows: tuple[int, ...], columns: int, **settings: Any) -> list[QuantizedSpectrum]:
    high = settings.pop("high", 7)
    return [random_codes(own, columns, high, torch.int8, **settings) for own in rows]


def dense(parts: list[QuantizedSpectrum]) -> Tensor:
    return torch.cat([own.to_dense(torch.float64) for own in parts])


@pytest.mark.parametrize("resident", ["int8", "int4", "streamed"])
@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,), ()])
@pytest.mark.parametrize(
    ("rows", "columns", "settings"),
    [
        ((32,), 48, {}),
        ((37,), 41, {"offset": 0.25}),
        ((9,), 5, {"transform": "hadamard"}),
        ((33, 20), 24, {"transform": "identity"}),
        ((32, 21), 35, {"transform": "hartley", "tile": 8}),
    ],
)
def test_is_the_matrix(
    resident: str, axes: tuple[int, ...], rows: tuple[int, ...], columns: int, settings: dict[str, Any]
) -> None:
    parts = spectra(rows=rows, columns=columns, axes=axes, **settings)
    weight = dense(parts)
    forms = SpectralWeight.from_spectra(parts, resident).forms
    for dtype, tolerance in TOLERANCE.items():
        x, g = noise(2, 3, columns).to(dtype), noise(2, 3, sum(rows)).to(dtype)
        assert relative(recorded.product(x, forms), x.double() @ weight.T) < tolerance
        assert relative(recorded.product(g, forms, transposed=True), g.double() @ weight) < tolerance
    ids = torch.arange(sum(rows)).flip(0).reshape(1, -1)
    assert relative(recorded.rows(ids, forms), weight[ids]) < 1e-5


def test_levels_are_those_of_the_form() -> None:
    """Also those beyond half a byte, which are few."""
    part = spectra(rows=(64,), columns=65)[0]
    part.codes[3, 5], part.codes[63, 64], part.codes[0, 0] = 19, -20, 12
    for resident in ("int8", "int4", "streamed"):
        form = SpectralWeight.from_spectra(part, resident).forms[0]
        assert torch.equal(form.recorded_levels(), part.codes)
        assert torch.equal(form.levels(torch.arange(64)), part.codes)


@pytest.mark.parametrize("way", WAYS)
def test_layers(way: str) -> None:
    torch._dynamo.reset()
    x, ids = noise(5, 40), torch.tensor([[0, 30, 7], [36, 36, 1]])
    plain = spectra(rows=(37,), columns=40)
    layers: list[tuple[nn.Module, Tensor, Tensor]] = [
        (SpectralLinear.from_quantized(plain, noise(37), "int4"), x, noise(2, 3, 40)),
        (SpectralConv1D.from_quantized(spectra(rows=(24, 16), columns=30)), x, noise(9, 40)),
        (SpectralEmbedding.from_quantized(plain), ids, ids[:1]),
    ]
    for layer, first, second in layers:
        recording = WAYS[way](layer, first)
        with torch.no_grad():
            assert torch.allclose(recording(first), layer(first), atol=1e-4)
            if way != "export":
                assert torch.allclose(recording(second), layer(second), atol=1e-4)


def test_nothing_recorded_stays_in_the_caches() -> None:
    """A transform that is first asked for while a graph is made has numbers afterwards."""
    layer = SpectralLinear.from_quantized(spectra(rows=(26,), columns=26, tile=13))
    torch.export.export(layer, (noise(2, 26),), strict=False)
    assert relative(layer(noise(2, 26)), noise(2, 26).double() @ layer.weight.double().T) < 1e-5


def test_any_number_of_tokens() -> None:
    layer = SpectralLinear.from_quantized(spectra(rows=(40,), columns=24))
    tokens = torch.export.Dim("tokens", min=2)
    recording = torch.export.export(layer, (noise(3, 24),), dynamic_shapes=({0: tokens},), strict=False).module()
    for count in (2, 3, 17, 80):
        assert torch.allclose(recording(noise(count, 24)), layer(noise(count, 24)), atol=1e-4)


@pytest.mark.parametrize("layer", [SpectralLinear, SpectralConv1D])
def test_gradients_of_what_is_compiled(layer: type[SpectralLinear] | type[SpectralConv1D]) -> None:
    """They go to the input, and what is kept for them is the levels and not their floating-point copy."""
    torch._dynamo.reset()
    own = layer.from_quantized(spectra(rows=(48,), columns=32))
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    kept: list[Tensor] = []
    inputs = [noise(4, own.in_features).requires_grad_() for _ in range(2)]
    own(inputs[0]).square().sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(inputs[1]).square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    assert {t.dtype for t in kept if t.numel() >= 48 * 32} <= {torch.int8}


def test_coded_forms() -> None:
    """torch.compile has an operator for them, and those that record operations are told what to do."""
    torch._dynamo.reset()
    layer = SpectralLinear.from_quantized(spectra(rows=(24,), columns=32), resident="coded")
    x = noise(3, 32)
    for record in (WAYS["export"], WAYS["trace"]):
        with pytest.raises(ConfigError, match=r"resident 'coded': is decoded by Python, .* model.dequantize\(\) first"):
            record(layer, x)


@pytest.mark.parametrize("resident", ["int8", "int12", "int4", "int5", "streamed"])
def test_transforms_of_functions(resident: str) -> None:
    """What torch.func makes of a layer that runs by itself: vmap, grad and tangents, for few and for many tokens."""
    part = spectra(rows=(37,), columns=40)[0]
    linear = SpectralLinear.from_quantized(part, noise(37), resident)
    turned = SpectralConv1D.from_quantized(part, noise(40), resident)
    weight = part.to_dense()
    for layer, matrix in ((linear, weight), (turned, weight.T)):
        layer.requires_grad_(False)
        x = noise(3, matrix.shape[1])
        one = torch.func.grad(lambda x, layer=layer: layer(x).square().sum())(x)
        assert relative(one, 2 * layer(x) @ matrix) < 1e-5
        each = torch.func.vmap(torch.func.grad(lambda x, layer=layer: layer(x).square().sum()))(x)
        assert relative(each, one) < 1e-5
        assert relative(torch.func.jacrev(layer)(x[0]), matrix) < 1e-5
        _, tangent = torch.func.jvp(layer, (x,), (x,))
        assert relative(tangent, x @ matrix.T) < 1e-5
    ids = torch.tensor([[3, 0], [36, 5]])
    assert relative(torch.func.vmap(SpectralEmbedding.from_quantized(part, resident))(ids), weight[ids]) < 1e-5


def test_transforms_of_functions_of_coded_forms() -> None:
    layer = SpectralLinear.from_quantized(spectra(rows=(24,), columns=32), resident="coded")
    with pytest.raises(ConfigError, match=r"resident 'coded': is decoded by Python, .* model.dequantize\(\) first"):
        torch.func.vmap(layer)(noise(2, 3, 32))


def test_experts_are_left_to_python() -> None:
    torch._dynamo.reset()
    weights = [SpectralWeight.from_spectra(spectra(rows=(24,), columns=32)) for _ in range(3)]
    experts = SpectralExperts(weights)
    compiled = torch.compile(lambda x, counts: experts(x, counts) * 2, backend="eager")
    x = noise(6, 32)
    for counts in ([1, 2, 3], [6, 0, 0], [0, 4, 2], [2, 2, 2]):
        assert torch.equal(compiled(x, counts), experts(x, counts) * 2)
