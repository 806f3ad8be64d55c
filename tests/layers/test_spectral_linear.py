"""SpectralLinear is nn.Linear with the decompressed weight, in every dtype, and survives what users do to modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.layers import SpectralLinear, SpectralWeight
from spectral_surgery.matmul import RESIDENTS


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_layer(bias: bool = True) -> nn.Linear:
    linear = nn.Linear(96, 130, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(0.02 * noise(*parameter.shape))
    return linear


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("resident", RESIDENTS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_decompressed_layer(resident: str, bias: bool) -> None:
    linear = dense_layer(bias)
    layer = SpectralLinear.from_dense(linear, bits=2, resident=resident)
    dense = layer.to_dense()
    assert (layer.in_features, layer.out_features, layer.bias is not None) == (96, 130, bias)
    assert 0.1 < relative(dense.weight, linear.weight) < 0.4
    torch.testing.assert_close(layer.weight, dense.weight)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        x = noise(2, 5, 96).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert relative(y, dense(x.float())) < tolerance


def test_targets_and_transforms() -> None:
    linear = dense_layer()
    errors = {
        name: relative(SpectralLinear.from_dense(linear, **options).weight, linear.weight)
        for name, options in {
            "bits": {"bits": 4},
            "max_error": {"max_error": 0.05, "transform": "hadamard", "tile": 32},
            "sparsity": {"sparsity": 0.2, "resident": "coded"},
        }.items()
    }
    assert errors["max_error"] <= 0.05 < errors["bits"] < 0.12 < errors["sparsity"] < 0.62


@pytest.mark.parametrize("resident", RESIDENTS)
def test_casts_keep_codes_and_scales(resident: str) -> None:
    layer = SpectralLinear.from_dense(dense_layer(), bits=2, resident=resident)
    before, state = layer.weight, {k: v.clone() for k, v in layer.spectrum.state_dict().items()}
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        cast()
        for name, value in layer.spectrum.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])
    assert torch.equal(layer.weight, before)
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == layer.spectrum.dtype == torch.bfloat16
    assert layer(noise(3, 96).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("resident", RESIDENTS)
def test_copies_pickles_and_state_dicts(resident: str) -> None:
    first = dense_layer()
    with torch.no_grad():
        first.weight[:64, :64] += 0.02  # a code that no nibble holds; the other layer has none
    layer = SpectralLinear.from_dense(first, bits=2, resident=resident)
    x = noise(3, 96)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    linear = dense_layer()
    with torch.no_grad():
        linear.weight.copy_(0.05 * noise(130, 96, seed=3))
    other = SpectralLinear.from_dense(linear, bits=2, resident=resident)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_meta_device_and_no_parameters_but_the_bias() -> None:
    layer = SpectralLinear.from_dense(dense_layer(), bits=4)
    assert [name for name, own in layer.named_parameters() if own.numel()] == ["bias"]
    assert all(tensor.is_meta for tensor in layer.to("meta").state_dict().values())


def test_adapters_train_on_it() -> None:
    layer = SpectralLinear.from_dense(dense_layer(), bits=4).requires_grad_(False)
    down, up = nn.Linear(96, 4, bias=False), nn.Linear(4, 96, bias=False)
    x = noise(7, 96)
    gradients = []
    for base in (layer, layer.to_dense().requires_grad_(False)):
        loss = base(x + up(down(x))).square().sum()
        gradients.append(torch.autograd.grad(loss, [down.weight, up.weight]))
    for ours, dense in zip(*gradients, strict=True):
        assert relative(ours, dense) < 1e-5


def test_autocast_is_that_of_a_linear_layer() -> None:
    layer = SpectralLinear.from_dense(dense_layer(), bits=4)
    dense = layer.to_dense()
    x = noise(3, 96).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == dense(x).dtype == torch.bfloat16
        y.sum().backward()
    assert relative(y, dense(x)) < 1e-2
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64


def test_from_quantized_with_several_row_ranges() -> None:
    parts = [encode(noise(rows, 96, seed=rows), Target("bits", 4.0), Basis(tile=32))[0] for rows in (64, 32, 5)]
    expected = torch.cat([part.to_dense() for part in parts])
    bias = noise(101)
    for resident, spectra in (("int8", parts), ("coded", [part.decode() for part in parts])):
        layer = SpectralLinear.from_quantized(spectra, bias, resident)
        torch.testing.assert_close(layer.weight, expected)
        x = noise(4, 96)
        assert relative(layer(x), x @ expected.T + bias) < 1e-5
    layer = SpectralLinear.from_quantized(parts[0].decode())
    assert (layer.out_features, layer.bias) == (64, None)
    ids = torch.tensor([[0, 63, 64], [100, 5, 95]])
    rows = SpectralWeight.from_spectra(parts, "int8").rows(ids)
    torch.testing.assert_close(rows, expected[ids])


def test_it_says_what_it_costs() -> None:
    layer = SpectralLinear.from_dense(dense_layer(), bits=4, resident="int8")
    text = repr(layer)
    assert "in_features=96, out_features=130, bias=True, bits_per_weight=8" in text
    assert "resident=int8, transform=dct, tile=64, bits_per_weight=8" in text
    assert layer.spectrum.bits_per_weight == 8 * (96 * 130 + 4) / (96 * 130)


def test_bad_input() -> None:
    linear = dense_layer()
    for options, count in (({}, 0), ({"bits": 4, "max_error": 0.1}, 2)):
        with pytest.raises(
            ConfigError, match=rf"from_dense: expected one of sparsity, bits and max_error, got {count}"
        ):
            SpectralLinear.from_dense(linear, **options)
    with pytest.raises(ConfigError, match=r"resident form: expected one of int8,.*got 'int3'"):
        SpectralLinear.from_dense(linear, bits=4, resident="int3")
    with pytest.raises(
        ConfigError,
        match=r"resident 'int4': codes reach .*; expected -8 to 7 at this offset, but for one code in 64",
    ):
        SpectralLinear.from_dense(linear, bits=5, resident="int4")
    spectrum: Any = encode(linear.weight, Target("bits", 4.0))[0]
    with pytest.raises(ShapeError, match=r"bias: expected \(130,\), got \(3,\)"):
        SpectralLinear.from_quantized(spectrum, noise(3))
    with pytest.raises(ShapeError, match=r"spectra: expected one or more of the same width, got 0 with \[\] columns"):
        SpectralLinear.from_quantized([])
    layer = SpectralLinear.from_quantized(spectrum)
    with pytest.raises(ShapeError, match=r"x is \(3, 95\); expected \[\.\.\., 96\]"):
        layer(noise(3, 95))
    with pytest.raises(ShapeError, match=r"rows: -1 to 3 were asked for; expected 0 to 129"):
        layer.spectrum.rows(torch.tensor([3, -1]))
