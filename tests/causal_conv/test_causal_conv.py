"""The fast convolution equals its definition, in values and gradients, and keeps the future out bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_surgery.causal_conv import causal_fft_conv, causal_fft_conv_step, slabs
from spectral_surgery.causal_conv.reference import causal_conv
from spectral_surgery.errors import ShapeError

PATHS = {"products": 1 << 20, "fft": 0}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def kernel_of(length: int, lags: int, chunk: int | None, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(2, lags, dtype=dtype) if chunk is None else draw(2, -(-length // chunk), lags, dtype=dtype)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(slabs, "PRODUCT_LAGS", PATHS[request.param])
    return str(request.param)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("chunk", [None, 16, 50, 256])
@pytest.mark.parametrize("lags", [1, 3, 64, 300])
@pytest.mark.parametrize("length", [1, 2, 15, 64, 301, 600])
def test_equals_the_sum(length: int, lags: int, chunk: int | None) -> None:
    x, kernel = draw(2, 3, length), kernel_of(length, lags, chunk)
    torch.testing.assert_close(causal_fft_conv(x, kernel, chunk), causal_conv(x, kernel, chunk), rtol=0, atol=1e-11)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_surgery.causal_conv import windows

    monkeypatch.setattr(windows, "PRODUCT_SIZE", 2)
    x, kernel = draw(2, 2, 11).requires_grad_(), kernel_of(11, 6, chunk).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: causal_fft_conv(a, b, chunk), (x, kernel))
    wanted = torch.autograd.grad(causal_conv(x, kernel, chunk).square().sum(), (x, kernel))
    got = torch.autograd.grad(causal_fft_conv(x, kernel, chunk).square().sum(), (x, kernel))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("chunk", "lags"), [(None, 40), (None, 700), (96, 200)])
def test_the_future_reaches_no_bit_of_the_past(chunk: int | None, lags: int) -> None:
    x, kernel = draw(2, 2, 700, dtype=torch.float32), kernel_of(700, lags, chunk, torch.float32)
    y = causal_fft_conv(x, kernel, chunk)
    for cut in (1, 31, 32, 127, 128, 129, 350, 511, 699):
        changed = x.clone()
        changed[..., cut:] *= -1e4
        z = causal_fft_conv(changed, kernel, chunk)
        assert torch.equal(z[..., :cut], y[..., :cut])
        assert not torch.equal(z[..., cut:], y[..., cut:])


def test_one_fft_over_all_of_time_would_not_do() -> None:
    x, kernel = draw(2, 2, 700, dtype=torch.float32), kernel_of(700, 40, None, torch.float32)

    def padded(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, n=1400) * torch.fft.rfft(kernel[:, None], n=1400)
        return torch.fft.irfft(spectrum, n=1400)[..., :700]

    torch.testing.assert_close(padded(x), causal_fft_conv(x, kernel), rtol=0, atol=1e-4)
    changed = x.clone()
    changed[..., 350:] *= -1e4
    assert not torch.equal(padded(changed)[..., :350], padded(x)[..., :350])


@pytest.mark.usefixtures("path")
def test_dtypes_layouts_and_autocast() -> None:
    x, kernel = draw(2, 90, 3, dtype=torch.float32).transpose(1, 2), kernel_of(90, 20, None, torch.float32)
    wanted = causal_conv(x, kernel)
    assert not x.is_contiguous()
    torch.testing.assert_close(causal_fft_conv(x, kernel), wanted, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(causal_fft_conv(x, kernel), wanted, rtol=0, atol=1e-5)
    half = causal_fft_conv(x.bfloat16(), kernel)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, causal_fft_conv(x.bfloat16().float(), kernel).bfloat16())


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = draw(2, 3, 50), kernel_of(50, 20, None)
    wanted = causal_conv(x, kernel)
    for slab in (1, 100, 160, 1000):
        monkeypatch.setattr(slabs, "SLAB", slab)
        torch.testing.assert_close(causal_fft_conv(x, kernel), wanted, rtol=0, atol=1e-12)


def test_a_step_gives_the_newest_output() -> None:
    x, kernel = draw(2, 3, 40), kernel_of(40, 16, None)
    newest = causal_fft_conv_step(x[..., -16:].transpose(-1, -2), kernel)
    torch.testing.assert_close(newest, causal_conv(x, kernel)[..., -1])


@pytest.mark.parametrize(
    ("x", "kernel", "chunk", "text"),
    [
        ((2, 3, 0), (2, 4), None, r"causal_fft_conv: expected x \[\.\.\., N,.*got \(2, 3, 0\) and \(2, 4\)"),
        ((3,), (4,), None, r"causal_fft_conv: expected x \[\.\.\., N,.*got \(3,\) and \(4,\)"),
        ((2, 3, 9), (2, 0), None, r"causal_fft_conv: expected x \[\.\.\., N,.*got \(2, 3, 9\) and \(2, 0\)"),
        ((2, 3, 9), (2, 2, 4), 4, r"causal_fft_conv: expected a kernel of.*got \(2, 2, 4\)"),
        ((2, 3, 9), (3, 4), None, r"causal_fft_conv: expected a kernel of.*got \(3, 4\)"),
    ],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], kernel: tuple[int, ...], chunk: int | None, text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        causal_fft_conv(torch.zeros(x), torch.zeros(kernel), chunk)
