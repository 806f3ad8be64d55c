"""A few tokens in one call of a kernel: outputs beside the exact product, and all that it leaves to the general way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spectral_surgery.matmul.few_tokens as few_tokens_module
from spectral_surgery import matmul as op
from spectral_surgery.codec import encoded as codec
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import CheckpointError
from spectral_surgery.matmul.dispatch import most_tokens
from spectral_surgery.matmul.few_tokens import few_tokens
from spectral_surgery.matmul.form import Form
from tests.support.spectra import form_of, noise, random_codes, relative

ROOT = Path(__file__).parents[2]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = ((192, 128), (200, 96), (130, 333), (4, 64), (67, 100), (1000, 65))
SHAPES_OF_FIVE = ((192, 128), (200, 96), (130, 336), (4, 64), (67, 112), (1000, 80))
PROCESSORS = {  # as numba compiles for them
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2"},
    "plain": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exact(x: Tensor, form: Form, bias: Tensor | None = None) -> Tensor:
    dense = torch.cat(list(op.dense_rows(form))).double()
    return torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double())


def taken(x: Tensor, form: Form, bias: Tensor | None = None) -> Tensor:
    y = few_tokens(x, form, bias)
    assert y is not None, "was left to the general way"
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], form.shape[0]))
    return y


def error(y: Tensor, reference: Tensor) -> float:
    """The largest of a token."""
    return max(relative(one.double(), other) for one, other in zip(y, reference, strict=True))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,)])
@pytest.mark.parametrize("transform", ["dct", "identity", "hadamard"])
@pytest.mark.parametrize(("resident", "high"), [("int8", 60), ("int4", 7), ("int5", 15)])
@pytest.mark.parametrize("dtype", BOUND)
def test_equals_the_exact_product(
    axes: tuple[int, ...], transform: str, resident: str, high: int, dtype: torch.dtype
) -> None:
    for number, (rows, columns) in enumerate(SHAPES_OF_FIVE if resident == "int5" else SHAPES):
        offset = 0.5 if number % 2 and resident == "int4" else 0.0
        spectrum = random_codes(rows, columns, high, torch.int8, axes=axes, transform=transform, offset=offset)
        form = op.resident_form(spectrum, resident)
        bias = noise(rows).to(dtype)
        for tokens in (1, 3, 5 + number, 33, most_tokens(rows * columns, torch.bfloat16)):
            x = noise(tokens, columns).to(dtype)
            assert error(taken(x, form), exact(x, form)) < BOUND[dtype]
            assert error(taken(x, form, bias), exact(x, form, bias)) < BOUND[dtype]


@pytest.mark.usefixtures("one_thread")  # or as many as the test sets
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("high", "offset"), [(60, 0.0), (7, 0.25)])
@pytest.mark.parametrize("shape", [(460, 333), (65, 64), (131, 4100), (67, 32)])
def test_frames_are_decoded_and_multiplied_at_once(
    shape: tuple[int, int], high: int, offset: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of 64 rows, of which the last has as few as one: rows that are taken together are of one frame."""
    monkeypatch.setattr(codec, "FRAME_SIZE", 1)
    torch.set_num_threads(threads)
    monkeypatch.setattr(few_tokens_module, "ONE_THREAD", 0)
    spectrum = random_codes(
        *shape, high, torch.int8, tile=64, offset=offset, step=0.01 * (1 + torch.arange(shape[1]) % 3)
    )
    form, bias = op.resident_form(spectrum, "coded"), noise(shape[0])
    assert len(form.starts) == -(-shape[0] // 64) + 1  # type: ignore[attr-defined]
    for dtype, tokens in ((torch.float32, 1), (torch.bfloat16, 5), (torch.float16, 31)):
        x = noise(tokens, shape[1]).to(dtype)
        assert error(taken(x, form, bias.to(dtype)), exact(x, form, bias.to(dtype))) < BOUND[dtype]


@pytest.mark.parametrize("quantizer", ["lattice", "scalar"])
@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0])
def test_frames_of_encoded_matrices(quantizer: str, bits: float) -> None:
    encoded, _ = encode(noise(200, 333), Target("bits", bits), quantizer=quantizer)
    form, x = op.resident_form(encoded, "coded"), noise(3, 333)
    assert error(taken(x, form), x.double() @ encoded.to_dense().double().T) < 2e-6


@pytest.mark.parametrize(
    "settings", [{"high": 200, "dtype": torch.int16}, {"high": 100, "dtype": torch.int8, "offset": 0.25}]
)
def test_frames_beyond_int8_go_the_general_way(settings: dict[str, Any]) -> None:
    spectrum = random_codes(130, 96, **settings)
    form, x = op.resident_form(spectrum, "coded"), noise(3, 96)
    assert few_tokens(x, form, None) is None
    assert error(op.form_matmul(x, [form]), exact(x, form)) < 2e-6


def test_damaged_frames_are_errors() -> None:
    form, x = op.resident_form(random_codes(130, 96, 20, torch.int8), "coded"), noise(3, 96)
    form.data[-7] ^= 64  # type: ignore[attr-defined]
    assert few_tokens(x, form, None) is None
    with pytest.raises(CheckpointError, match="the stream does not end where it should"):
        op.form_matmul(x, [form])


@pytest.mark.parametrize(
    "change",
    [
        lambda form: {"scale": form.scale.bfloat16()},
        lambda form: {"scale": form.scale.repeat(5)},
        lambda _: {"row_scale": torch.ones(7)},
        lambda form: {"ends": form.ends * 1000},
        lambda form: {"ends": form.ends.flip(0)},
        lambda form: {"ends": form.ends.int()},
        lambda form: {"starts": form.starts * 2},
        lambda form: {"starts": form.starts + 1},
        lambda form: {"starts": form.starts[:1]},
    ],
)
def test_frames_that_kernels_would_read_wrongly(change: Any) -> None:
    """A cast or damaged state: nothing is read beyond its memory, or as another type."""
    form = op.resident_form(random_codes(130, 96, 20, torch.int8), "coded")
    assert few_tokens(noise(3, 96), form, None) is not None
    assert few_tokens(noise(3, 96), replace(form, **change(form)), None) is None  # type: ignore[type-var]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("resident", ["int8", "int4"])
def test_steps_of_columns_and_outliers(resident: str, dtype: torch.dtype) -> None:
    steps = 0.01 * (1 + torch.arange(128) % 5)
    spectrum = random_codes(192, 128, 7, torch.int8, step=steps, offset=0.5)
    spectrum.codes[torch.arange(0, 192, 3), torch.arange(64) * 2] = 12  # a third of the rows have one
    form, x = op.resident_form(spectrum, resident), noise(3, 128).to(dtype)
    assert len(form.places) == (64 if resident == "int4" else 0)  # type: ignore[attr-defined]
    assert error(taken(x, form), x.double() @ spectrum.to_dense().double().T) < BOUND[dtype]


@pytest.mark.parametrize("columns", [32, 4128, 8256, 8257, 20000])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_extremes_do_not_overflow(columns: int, sign: int) -> None:
    """All levels and all activations at their peaks: integers, which are exact as long as none is beyond int32."""
    levels = torch.full((8, columns), 127 * sign, dtype=torch.int8)
    form = form_of(levels)
    y = taken(torch.full((5, columns), 1.5), form)
    assert torch.allclose(y, torch.full((5, 8), 127.0 * 1.5 * columns * sign), rtol=1e-6)


def test_terms_that_stand_out_are_as_exact_as_bfloat16() -> None:
    """One term in thousands at the peak: integers of the others would be zero, and others take their place."""
    columns = 1 << 15
    form = form_of(torch.full((4, columns), 3, dtype=torch.int8))
    x = torch.full((1, columns), 0.004).bfloat16()
    x[0, 5] = 4096
    assert error(taken(x, form), exact(x, form)) < 2**-8
    x[0, 5], x[0, 6] = 0.0, 0.0
    assert error(taken(x, form), exact(x, form)) < 2**-8


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e-30, 1e-18, 1e30])
def test_very_small_and_very_large_activations(scale: float) -> None:
    form = op.resident_form(random_codes(64, 128, 60, torch.int8), "int8")
    x = noise(2, 128) * scale
    y, reference = taken(x, form), exact(x, form)
    assert (y.double() - reference).norm() <= 5e-7 * reference.norm() + 1e-43  # where numbers end
    bias = scale * noise(64)
    assert (taken(x, form, bias) - exact(x, form, bias)).norm() <= 5e-7 * reference.norm() + 1e-43
    many = scale * noise(20, 128)
    many[3] = noise(128)
    assert error(op.form_matmul(many, [form])[3:4], exact(many, form)[3:4]) < 1e-6
    many, wanted = (y[torch.arange(20) != 3] for y in (op.form_matmul(many, [form]), exact(many, form)))
    assert (many - wanted).norm() <= 1e-6 * wanted.norm() + 1e-43


@pytest.mark.parametrize("resident", ["int8", "int4", "coded"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("tokens", [2, 260])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite_gives_what_a_dense_layer_gives(
    resident: str, value: float, tokens: int, dtype: torch.dtype
) -> None:
    spectrum = random_codes(70, 130, 7, torch.int8)
    form, x = op.resident_form(spectrum, resident), noise(tokens, 130).to(dtype)
    x[1, 7] = value
    dense = torch.nn.functional.linear(x, spectrum.to_dense().to(dtype))
    assert torch.equal(op.form_matmul(x, [form])[1].isnan(), dense[1].isnan())
    assert torch.equal(op.form_matmul(x, [form])[1].nan_to_num(), dense[1].nan_to_num())
    turned, v = noise(tokens, 70).to(dtype), spectrum.to_dense().to(dtype)
    turned[1, 7] = value
    assert torch.equal(op.form_matmul_transposed(turned, [form])[1].nan_to_num(), (turned @ v)[1].nan_to_num())


def test_what_is_left_to_the_general_way() -> None:
    form = op.resident_form(random_codes(192, 128, 60, torch.int8), "int8")
    x, bias = noise(8, 128).bfloat16(), torch.zeros(192, dtype=torch.bfloat16)
    assert few_tokens(x, form, bias) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert few_tokens(x, form, None) is None
    others = (
        x.clone().requires_grad_(),
        x.double(),
        x[:0],
        x[:, :64],
        noise(4097, 128),
        x.to("meta"),
        x.int(),
    )
    assert [few_tokens(other, form, None) for other in others] == [None] * len(others)
    assert few_tokens(x, form, bias.float()) is None
    assert few_tokens(x, form, bias.clone().requires_grad_()) is None
    assert few_tokens(x, op.resident_form(random_codes(3, 128, 60, torch.int8), "int8"), None) is None
    assert few_tokens(noise(2, 31), op.resident_form(random_codes(64, 31, 60, torch.int8), "int8"), None) is None
    batched = torch.func.vmap(lambda one: op.form_matmul(one, [form]))(x)
    assert relative(batched, taken(x, form)) < 2**-7


def test_whatever_strides_and_modes() -> None:
    form = op.resident_form(random_codes(192, 128, 60, torch.int8), "int8")
    x = noise(128, 6)
    expected = taken(x.T.contiguous(), form)
    assert torch.equal(taken(x.T, form), expected)
    assert torch.equal(taken(x.T.reshape(2, 3, 128), form), expected.reshape(2, 3, 192))
    with torch.inference_mode():
        assert torch.equal(taken(x.T, form), expected)
    assert torch.equal(taken(x.T.contiguous()[2], form), expected[2])


@pytest.mark.usefixtures("one_thread")  # or as many as the test sets
def test_the_same_bits_whatever_the_threads() -> None:
    form = op.resident_form(random_codes(640, 512, 60, torch.int8), "int8")
    x, results = noise(7, 512), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(taken(x, form))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_several_threads_of_python_at_once() -> None:
    form = op.resident_form(random_codes(640, 512, 60, torch.int8), "int8")
    inputs = [noise(1 + number % 5, 512) + number for number in range(12)]
    expected = [taken(x, form) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: taken(x, form), inputs))
    assert all(map(torch.equal, results, expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_other_processors(name: str) -> None:
    """The vectors of this kernel, compiled for fewer instructions than this machine has."""
    chosen = [
        f"{__file__}::{test}" for test in ("test_steps_of_columns_and_outliers", "test_whatever_strides_and_modes")
    ]
    chosen += [f"{__file__}::test_sums_of_extremes_do_not_overflow", f"{__file__}::test_equals_the_exact_product"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    environment = os.environ | PROCESSORS[name] | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
