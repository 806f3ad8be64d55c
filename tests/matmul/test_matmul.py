"""Products with resident spectra equal products with the decompressed matrix, and never make one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_surgery import matmul as op
from spectral_surgery.codec import encoded as codec
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError, DomainError, ShapeError
from spectral_surgery.matmul import coded, dispatch, integer, level_form, levels
from spectral_surgery.matmul.dispatch import Processor
from spectral_surgery.sparse.tensor import sst
from spectral_surgery.transforms import TRANSFORMS
from tests.support.spectra import TOLERANCE, by_token, noise, random_codes, relative


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def made(shape: tuple[int, int] = (200, 160), bits: float = 2.0, **basis: Any) -> EncodedSpectrum:
    return encode(0.02 * noise(*shape), Target("bits", bits), Basis(**basis))[0]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("resident", op.RESIDENTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_form_and_dtype_is_the_reference(resident: str, dtype: torch.dtype) -> None:
    spectrum = made()
    dense = spectrum.to_dense()
    form = op.resident_form(spectrum, resident)
    assert form.shape == dense.shape
    for tokens in (1, 8, 9, 65, 257):
        x = noise(tokens, 160, seed=tokens).to(dtype)
        assert by_token(op.form_matmul(x, [form]), x.double() @ dense.double().T) < TOLERANCE[dtype]
        back = noise(tokens, 200, seed=tokens).to(dtype)
        y = op.form_matmul_transposed(back, [form])
        assert by_token(y, back.double() @ dense.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,), ()])
@pytest.mark.parametrize("shape", [(1, 1), (15, 17), (63, 16), (17, 1000)])
def test_all_transforms_axes_and_remainders(name: str, axes: tuple[int, ...], shape: tuple[int, int]) -> None:
    spectrum = random_codes(*shape, 5, torch.int8, transform=name, axes=axes, offset=-0.25)
    x = noise(2, 3, shape[1])
    expected = op.spectral_matmul(x, spectrum)
    for resident in op.RESIDENTS:
        y = op.form_matmul(x, [op.resident_form(spectrum, resident)])
        assert y.shape == (2, 3, shape[0])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("high", "dtype"), [(127, torch.int8), (3000, torch.int16), (100_000, torch.int32)])
@pytest.mark.parametrize("offset", [0.0, 0.3, -0.123456])
def test_coded_holds_all_codes_exactly(high: int, dtype: torch.dtype, offset: float) -> None:
    spectrum = random_codes(40, 32, high, dtype, offset=offset)
    form = op.resident_form(spectrum, "coded")
    x = noise(4, 32)
    assert relative(op.form_matmul(x, [form]), op.spectral_matmul(x, spectrum)) < 1e-5
    coefficients = form.levels(torch.tensor([39, 0, 7])) * form.scale
    torch.testing.assert_close(coefficients, spectrum.coefficients()[[39, 0, 7]])


@pytest.mark.parametrize("resident", op.RESIDENTS)
def test_steps_by_column(resident: str) -> None:
    spectrum = random_codes(24, 33, 6, torch.int8, step=torch.rand(33) + 0.5, offset=0.5)
    x = noise(5, 33)
    assert relative(op.form_matmul(x, [op.resident_form(spectrum, resident)]), op.spectral_matmul(x, spectrum)) < 1e-5
    back = noise(5, 24)
    y = op.form_matmul_transposed(back, [op.resident_form(spectrum, resident)])
    assert relative(y, back @ spectrum.to_dense()) < 1e-5


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("resident", op.RESIDENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_no_floating_matrix_is_ever_allocated(resident: str, dtype: torch.dtype, tokens: int) -> None:
    spectrum = made((512, 512))
    form = op.resident_form(spectrum, resident)
    x = noise(tokens, 512).to(dtype).requires_grad_()
    with Watch() as watch:
        op.form_matmul(x, [form]).sum().backward()
    assert x.grad is not None
    assert 0 < watch.largest_float < 512 * 512
    with Watch() as watch:
        op.spectral_matmul(x, spectrum.decode())
    assert watch.largest_float >= 512 * 512  # the watch does see one


class Watch(TorchDispatchMode):
    """Sees the size of every tensor that any operation returns, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_float = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest_float = max(self.largest_float, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("resident", op.RESIDENTS)
@pytest.mark.parametrize("axes", [(0, 1), (1,)])
def test_gradients(resident: str, axes: tuple[int, ...]) -> None:
    spectrum = random_codes(20, 12, 5, torch.int8, axes=axes, tile=8, offset=0.5)
    form = op.resident_form(spectrum, resident)
    x = noise(3, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op.form_matmul(x, [form]), (x,))
    assert torch.autograd.gradgradcheck(lambda x: op.form_matmul(x, [form]), (x,))
    back = noise(3, 20).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op.form_matmul_transposed(x, [form]), (back,))


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_that_of_the_dense_layer(dtype: torch.dtype) -> None:
    spectrum = made()
    x, g = noise(20, 160).to(dtype).requires_grad_(), noise(20, 200, seed=1).to(dtype)
    y = op.form_matmul(x, [op.resident_form(spectrum, "int8")])
    y.backward(g.to(y.dtype))
    assert x.grad is not None
    assert relative(x.grad, g.double() @ spectrum.to_dense().double()) < TOLERANCE[dtype]


def test_several_forms_are_row_ranges() -> None:
    parts = [made((64, 48)), made((32, 48), transform="haar"), made((16, 48), bits=3.0)]
    dense = torch.cat([part.to_dense() for part in parts])
    forms = [op.resident_form(part, "int8") for part in parts]
    x = noise(5, 48)
    assert relative(op.form_matmul(x, forms), x @ dense.T) < 1e-5
    back = noise(5, 112)
    assert relative(op.form_matmul_transposed(back, forms), back @ dense) < 1e-5


def test_a_form_can_be_laid_out_transposed() -> None:
    parts = [made((64, 48)), made((50, 48))]
    parts[0].step.mul_(3)
    (form,) = op.resident_forms(parts, "int8")
    turned = op.transposed_form(form)  # type: ignore[arg-type]
    assert turned is not None
    x = noise(3, 114)
    expected = x @ torch.cat([part.to_dense() for part in parts])
    assert relative(op.form_matmul(x, [turned]), expected) < 1e-5
    columns = random_codes(64, 48, 7, torch.int8, step=torch.rand(48))
    assert op.transposed_form(op.resident_form(columns, "int8")) is None  # type: ignore[arg-type]


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("resident", op.RESIDENTS)
def test_odd_inputs(resident: str) -> None:
    spectrum = made()
    form = op.resident_form(spectrum, resident)
    assert op.form_matmul(noise(0, 160), [form]).shape == (0, 200)
    assert op.form_matmul(torch.zeros(2, 160), [form]).eq(0).all()
    strided = noise(160, 6).T[::2]
    assert relative(op.form_matmul(strided, [form]), strided @ spectrum.to_dense().T) < 1e-5
    for dtype in (torch.float32, torch.bfloat16):
        bad = noise(3, 160).to(dtype)
        bad[1, 5] = float("nan")
        y = op.form_matmul(bad, [form])
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("resident", op.RESIDENTS)
@pytest.mark.parametrize("axes", [(0, 1), (1,)])
def test_many_frames_and_blocks(resident: str, axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_SIZE", 1)
    monkeypatch.setattr(coded, "_BLOCK", 1 << 15)
    monkeypatch.setattr(level_form, "BLOCK", 50 * 333)  # no whole tiles, and an odd number of columns
    spectrum, _ = encode(noise(460, 333), Target("bits", 2.0), Basis(axes=axes))
    assert len(spectrum.frames) == 8
    form, dense = op.resident_form(spectrum, resident), spectrum.to_dense()
    assert relative(op.form_matmul(noise(3, 333), [form]), noise(3, 333) @ dense.T) < 1e-5
    assert relative(op.form_matmul_transposed(noise(3, 460), [form]), noise(3, 460) @ dense) < 1e-5


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("threads", [1, 2])
def test_coded_decodes_blocks_in_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "_BLOCK", 1)
    spectrum = random_codes(1000, 4100, 3, torch.int8, tile=64)
    form = op.resident_form(spectrum, "coded")
    assert len(form._spans()) == 4  # type: ignore[attr-defined]
    before = torch.get_num_threads()
    x = noise(2, 4100)
    torch.set_num_threads(threads)
    try:
        y = op.form_matmul(x, [form])
        back = op.form_matmul_transposed(noise(2, 1000), [form])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert relative(y, op.spectral_matmul(x, spectrum)) < 1e-5
    assert relative(back, noise(2, 1000) @ spectrum.to_dense()) < 1e-5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_coded_in_a_forked_process() -> None:
    """Threads that decode do not live on in a child: it starts its own."""
    program = """
import multiprocessing, sys, torch
from spectral_surgery import matmul as op
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target
torch.set_num_threads(2)
form = op.resident_form(encode(torch.randn(2100, 1024), Target("bits", 2.0))[0], "coded")
x = torch.randn(1, 1024)
expected = op.form_matmul(x, [form])
def child():
    torch.set_num_threads(2)
    raise SystemExit(0 if torch.equal(op.form_matmul(x, [form]), expected) else 1)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
sys.exit(process.exitcode if process.exitcode is not None else 2)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0


def test_forms_cost_what_they_say() -> None:
    spectrum = made((256, 256))
    int8, int4, coded = (op.resident_form(spectrum, name) for name in ("int8", "int4", "coded"))
    assert int8.codes.nbytes == 256 * 256  # type: ignore[attr-defined]
    assert int4.codes.nbytes == 256 * 128  # type: ignore[attr-defined]
    assert coded.data.nbytes == sum(map(len, spectrum.frames))  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(coded)).shape == (256, 256)


@pytest.mark.parametrize("offset", [0.0, 0.5, -0.5, 1.75, 25 / 14, 1 / 63])
def test_levels_are_the_reconstruction_points(offset: float) -> None:
    grid = levels.grid_of(float(torch.tensor(offset)))  # as a file holds it
    assert grid is not None
    codes = torch.tensor([-1, 0, 1], dtype=torch.int8)
    expected = torch.tensor([-1 - offset, 0, 1 + offset])
    torch.testing.assert_close(grid.levels(codes) / grid.parts, expected)
    assert grid.fits(-1, 1)
    assert not grid.fits(-128, 0)
    assert levels.grid_of(0.123456) is None


def test_digits_are_exact() -> None:
    x = torch.cat((noise(3, 64), torch.zeros(1, 64), torch.full((1, 64), 1e30), torch.tensor([[1.0, -1.0] * 32])))
    for count, error in ((2, 2e-5), (3, 1e-7)):
        digits, unit = integer._digits(x, count)
        number = sum(digits[i].double() * 256**i for i in range(count)) * unit
        assert (number - x).abs().max(1).values.le(error * x.abs().amax(1)).all()


def test_ways_and_types_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for processor, accuracy, expected in [
        (Processor(False, False), torch.bfloat16, "blocks"),
        (Processor(True, False), torch.bfloat16, "planes"),
        (Processor(True, True), torch.bfloat16, "blocks"),
        (Processor(True, True), torch.float32, "planes"),
        (Processor(True, True), torch.float64, "blocks"),
    ]:
        monkeypatch.setattr(dispatch, "processor", lambda processor=processor: processor)
        assert dispatch.way("cpu", 4096, accuracy) == expected
        assert dispatch.way("cpu", 200_000, torch.float32) == "blocks"  # int32 would overflow
        for installed in (True, False):
            monkeypatch.setattr(dispatch.gpu, "available", lambda installed=installed: installed)
            kernel = installed and accuracy != torch.float64
            assert dispatch.way("cuda", 4096, accuracy) == ("triton" if kernel else "blocks")
    assert dispatch.block_dtype("cpu", torch.bfloat16) == torch.bfloat16
    assert dispatch.block_dtype("cpu", torch.float16) == torch.float32
    assert dispatch.block_dtype("cuda", torch.float16) == torch.float16


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_block_streaming(block_size: int, dtype: torch.dtype) -> None:
    weight = noise(48, 37)
    x = noise(2, 3, 37).to(dtype)
    cases: list[tuple[Any, Tensor]] = [(torch.fft.fft2(weight.double()), weight)]
    for transform, tile in (("dct", 16), ("dct", None), ("rfft2", None)):
        sparse = sst(weight, 0.3, transform=transform, tile=tile)
        cases.append((sparse, sparse.to_spatial()))
    codes = random_codes(48, 37, 5, torch.int8, offset=0.5)
    cases.append((codes, codes.to_dense()))
    for spectrum, dense in cases:
        y = op.block_streaming_matmul(x, spectrum, block_size)
        assert y.dtype == dtype
        expected = x.double() @ dense.double().T
        assert relative(y, expected) < (1e-6 if dtype == torch.float64 else TOLERANCE[dtype])


def test_block_streaming_of_an_empty_block_and_gradients() -> None:
    weight = torch.zeros(8, 6)
    weight[0, 0] = 1
    sparse = sst(weight, 1 / 48, tile=2)
    x = noise(3, 6).double().requires_grad_()
    y = op.block_streaming_matmul(x, sparse, 1)
    torch.testing.assert_close(y, x @ sparse.to_spatial().double().T)
    assert torch.autograd.gradcheck(lambda x: op.block_streaming_matmul(x, sparse, 3), (x,))
    spectrum = torch.fft.fft2(noise(5, 6).double())
    assert torch.autograd.gradcheck(lambda x: op.block_streaming_matmul(x, spectrum, 2), (x,))


def test_bad_input() -> None:
    form = op.resident_form(made(), "int8")
    for matmul, width in ((op.form_matmul, 160), (op.form_matmul_transposed, 200)):
        with pytest.raises(ShapeError, match=rf"x is \(2, 7\); expected \[\.\.\., {width}\]"):
            matmul(noise(2, 7), [form])
        with pytest.raises(ConfigError, match=r"x is torch.int64; expected a floating type. Convert x first."):
            matmul(torch.zeros(2, width, dtype=torch.long), [form])
    with pytest.raises(ConfigError, match=r"resident form: expected one of int8,.*got 'int3'"):
        op.resident_form(made(), "int3")
    wide = random_codes(40, 32, 300, torch.int16)
    with pytest.raises(ConfigError, match=r"resident 'int8': codes reach -300 to 300; expected -127 to 127 at"):
        op.resident_form(wide, "int8")
    with pytest.raises(
        ConfigError, match=r"'int4': codes reach -9 to 9; expected -8 to 7 at this offset, but for one code"
    ):
        op.resident_form(random_codes(40, 32, 9, torch.int8), "int4")
    with pytest.raises(
        ConfigError, match=r"'int8': an offset of 0.123456 steps is on no grid of int8; expected a multiple of"
    ):
        op.resident_form(random_codes(40, 32, 9, torch.int8, offset=0.123456), "int8")
    with pytest.raises(
        ShapeError, match=r"shape \(4, 6\) with 3 steps; expected a non-empty \[O, I\] with 1 or I steps"
    ):
        op.resident_form(random_codes(4, 6, 2, torch.int8, step=torch.ones(3)), "int8")


def test_bad_input_of_block_streaming() -> None:
    sparse = sst(noise(8, 6))
    for error, text, x, weights, size in [
        (ConfigError, "block_size 0; expected 1 or more", noise(6), sparse, 0),
        (ShapeError, r"the weights are \(8,\); expected a matrix \[O, I\]", noise(6), sst(noise(8)), 1),
        (DomainError, "x is torch.int64; expected a real floating type", torch.ones(6, dtype=torch.long), sparse, 1),
        (ShapeError, r"x is \(5,\); expected \[\.\.\., 6\]", noise(5), sparse, 1),
        (DomainError, "the weights are a torch.float32 tensor; expected a spectrum", noise(6), noise(8, 6), 1),
    ]:
        with pytest.raises(error, match=text):
            op.block_streaming_matmul(x, weights, size)
