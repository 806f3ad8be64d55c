"""Kernels read addresses: whatever happens to a layer, its tensors or torch's defaults, they are the right ones."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery import matmul as op
from spectral_surgery.layers import SpectralEmbedding, SpectralLinear
from spectral_surgery.matmul import matrix_job
from tests.support.spectra import noise, random_codes, relative


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def layer(resident: str = "int8", offset: float = 0.0, seed: int = 0) -> SpectralLinear:
    high = {"int8": 60, "int4": 7, "int5": 15}[resident]
    spectrum = random_codes(128, 256, high, torch.int8, offset=offset)
    spectrum.codes.copy_(spectrum.codes.roll(seed, 0))
    return SpectralLinear.from_quantized(spectrum, noise(128, seed=seed), resident)


def right(own: SpectralLinear, x: Tensor) -> bool:
    assert own.bias is not None
    expected = nn.functional.linear(x.double(), own.weight.double(), own.bias.double())
    return relative(own(x), expected) < 2e-6


@pytest.mark.parametrize("resident", ["int8", "int4", "int5"])
def test_a_layer_on_another_device_is_an_error_of_torch(resident: str) -> None:
    own, x = layer(resident), noise(2, 256)
    assert right(own, x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        own.to("meta")(x)


@pytest.mark.parametrize("resident", ["int8", "int4", "int5"])
def test_defaults_of_torch_change_nothing(resident: str) -> None:
    own, x, many = layer(resident), noise(2, 256), noise(260, 256)
    table, ids = SpectralEmbedding(own.spectrum), torch.arange(50)
    expected = own(x), own(many), table(ids)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        torch.set_default_dtype(dtype)
        assert all(map(torch.equal, expected, (own(x), own(many), table(ids))))
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    assert torch.equal(expected[0], own(x))
    assert torch.equal(expected[2], table(ids))


@pytest.mark.parametrize("shape", [(3,), (1,), (129,)])
def test_a_bias_of_another_length_is_not_read(shape: tuple[int, ...]) -> None:
    own, x = layer(), noise(2, 256)
    bias = torch.ones(shape)
    if shape == (1,):
        y = op.form_matmul(x, own.spectrum.forms, bias)
        assert torch.allclose(y, op.form_matmul(x, own.spectrum.forms) + 1, atol=1e-5)
    else:
        with pytest.raises(RuntimeError):
            op.form_matmul(x, own.spectrum.forms, bias)


def test_views_without_numbers() -> None:
    own, x, bias = layer(), noise(2, 256), noise(128)
    forms = own.spectrum.forms
    y = op.form_matmul(x, forms, torch._neg_view(bias))
    assert torch.allclose(y, op.form_matmul(x, forms) - bias, atol=1e-5)
    assert not op.form_matmul(torch._efficientzerotensor(1, 256), forms).any()
    with pytest.raises((RuntimeError, NotImplementedError)):
        op.form_matmul(x, forms, bias.to("meta"))


@pytest.mark.parametrize("tokens", [2, 260])
@pytest.mark.parametrize(("before", "after"), [(0.125, 0.0), (0.0, 0.5), (0.25, 0.125)])
def test_a_state_with_other_points(before: float, after: float, tokens: int) -> None:
    own, other, x = layer("int4", before), layer("int4", after, seed=3), noise(tokens, 256)
    assert right(own, x)
    own.load_state_dict(other.state_dict())
    assert torch.equal(own.weight, other.weight)
    assert right(own, x)


@pytest.mark.parametrize("resident", ["int8", "int4", "int5"])
@pytest.mark.parametrize("name", ["codes", "scale", "places", "beyond", "lowest"])
def test_tensors_that_get_other_memory(resident: str, name: str) -> None:
    own, x = layer(resident), noise(2, 256)
    part = own.spectrum.parts[0]
    assert right(own, x)
    tensor = getattr(part, name)
    tensor.data = tensor.data * 3 if name == "scale" else tensor.data.clone()
    del tensor
    junk = [torch.full((1,), 9.0) for _ in range(100)]
    assert right(own, x), len(junk)


def test_transforms_that_were_forgotten() -> None:
    own, x = layer(), noise(2, 256)
    assert right(own, x)
    matrix_job._tiles.cache_clear()
    matrix_job.transform_matrix.cache_clear()
    gc.collect()
    junk = [torch.full((16, 16), 1.0) for _ in range(4000)]
    assert right(own, x), len(junk)


def test_pickles_have_no_addresses() -> None:
    own, x = layer(), noise(2, 256)
    form = own.spectrum.forms[0]
    expected = op.form_matmul(x, [form])
    assert vars(form)[matrix_job._KEPT].job is not None
    copied = pickle.loads(pickle.dumps(form))
    assert vars(copied)[matrix_job._KEPT] is None
    assert torch.equal(op.form_matmul(x, [copied]), expected)


def test_tensors_of_other_types_are_left_to_torch() -> None:
    own, x = layer(), noise(2, 256)
    state = {name: value.half() if value.is_floating_point() else value for name, value in own.state_dict().items()}
    own.load_state_dict(state, assign=True)
    assert own.bias is not None
    own.bias = nn.Parameter(own.bias.float())
    assert matrix_job.product_job(own.spectrum.forms[0]) is None  # type: ignore[arg-type]
    assert relative(own(x), nn.functional.linear(x, own.weight, own.bias)) < 1e-3


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")  # torch's
@pytest.mark.parametrize("tokens", [1, 260])
def test_tangents(tokens: int) -> None:
    own, x, tangent = layer(), noise(tokens, 256), noise(tokens, 256, seed=1)
    with torch.autograd.forward_ad.dual_level():
        y = own(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(y)
    assert found.tangent is not None
    assert relative(found.tangent, tangent.double() @ own.weight.double().T) < 1e-5
    assert right(own, x)


def test_gradients_of_one_token_of_a_compiled_layer() -> None:
    torch._dynamo.reset()
    own, x = layer(), noise(256)
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        torch.compile(own, backend="aot_eager", fullgraph=True)(given).sum().backward()
    assert torch.allclose(given.grad, own.weight.sum(0), atol=1e-3)  # type: ignore[arg-type]


def test_the_old_memory_is_given_back() -> None:
    own = layer()
    own(noise(2, 256))
    codes = weakref.ref(own.spectrum.parts[0].codes)
    own.to("meta")
    gc.collect()
    assert codes() is None


def test_damaged_outliers_do_not_leave_the_matrix() -> None:
    """Places that are out of order or range change numbers, and nothing else."""
    spectrum = random_codes(128, 256, 7, torch.int8)
    spectrum.codes[torch.arange(0, 128, 2), 5] = 12
    form = op.resident_form(spectrum, "int4")
    assert op.form_matmul(noise(2, 256), [form]).isfinite().all()
    form.places.copy_(form.places.flip(0))  # type: ignore[attr-defined]
    form.places[0] = 2**31 - 1  # type: ignore[attr-defined]
    form.places[1] = -5  # type: ignore[attr-defined]
    assert op.form_matmul(noise(2, 256), [form]).shape == (2, 128)
    rows = op.look_up(form, torch.arange(128))
    assert rows is not None
    assert rows.shape == (128, 256)
