"""FourierFT and FouRA on a GPU: the values of kernels in Triton's interpreter, and kernels where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from spectral_surgery.adapters.foura import Foura, FouraConfig
from spectral_surgery.fourier import adapted_linear, delta_weight, fold, fourier_delta, on_gpu, reference
from spectral_surgery.fourier.rfft_positions import Delta

triton_only = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

_HEAD = """
import sys

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from spectral_surgery.fourier import (
    adapted_linear, fold, fourier_delta, gather_scatter, on_gpu, operators, reference,
)
from spectral_surgery.fourier.rfft_positions import Delta
from spectral_surgery.gpu import low_rank

generator = torch.Generator().manual_seed(0)
LIMITS = ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10))

def randn(*shape):
    return torch.randn(*shape, generator=generator)

def close(got, wanted, limit, *what):
    error = float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))
    assert got.shape == wanted.shape and error < limit, (got.dtype, tuple(got.shape), error, *what)

class Launches(TorchDispatchMode):
    # what a GPU would be told to do; it is told nothing of views and of memory
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not any(word in func.name() for word in ("empty", "detach", "_unsafe_view")):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))

counted = Launches()
for name in ("components", "both_components", "expand", "coefficient_sums"):
    def launch(*args, run=getattr(low_rank, name).run, name=name, **options):
        counted.names.append(name)
        with _disable_current_modes():
            return run(*args, **options)
    getattr(low_rank, name).run = launch
"""
_WAVES = (
    _HEAD
    + """
used = []
def suits(x, delta):
    used.append(on_gpu.fits(len(x), x.dtype, delta))
    return used[-1]
on_gpu.suits = suits
SHAPES = (((12, 20), 30), ((21, 7), 40), ((1, 5), 5), ((7, 1), 3), ((50, 97), 20))
for (rows, columns), count in SHAPES:
    positions = torch.randperm(rows * columns, generator=generator)[:count]
    folded = fold(positions, rows, columns)
    for dtype, limit in LIMITS:
        for tokens in (1, 17) if dtype == torch.float32 else (3,):
            c, some = randn(2, count).t()[:, 0], (torch.float32, torch.bfloat16)[tokens == 3]
            c, wide = c.to(some).requires_grad_(), c.to(some).double().requires_grad_()
            x = randn(columns, tokens).to(dtype).T.requires_grad_()  # rows that are not contiguous
            weight, bias, dy = randn(rows, columns).to(dtype), randn(rows).to(dtype), randn(rows, tokens).to(dtype).T
            far = x.detach().double().requires_grad_()
            residual = reference.fourier_delta(far, wide, positions, rows, 7.0)
            for base in (True, False):
                y = adapted_linear(x, weight, bias, c, folded, 7.0) if base else fourier_delta(x, c, folded, rows, 7.0)
                wanted = residual + linear(far, weight.double(), bias.double()) if base else residual
                assert y.dtype == dtype
                close(y.detach(), wanted.detach(), limit, rows, columns, tokens, base)
                got = torch.autograd.grad(y, (x, c), dy)
                right = torch.autograd.grad(wanted, (far, wide), dy.double(), retain_graph=True)
                close(got[0], right[0], limit, "x", rows, columns, tokens, base)
                close(got[1], right[1], limit if some == torch.float32 else 2**-7, "coefficients", rows, tokens)
                assert got[1].dtype == some
assert all(used)
x = randn(2, 20)[:0]
assert fourier_delta(x, randn(30), torch.arange(30), 12, 7.0).shape == (0, 12)
assert not used[-1]

# angles of long axes, where they must not lose what float32 cannot hold
far = torch.tensor([65_533, 65_536 // 2, 20_001, 40_003])
delta = Delta(randn(4), fold(far, 1, 65_535), (1, 65_535), 1e5)
x, y = randn(1, 65_535), torch.empty(1, 1)
on_gpu.add_forward(y, x, delta, fresh=True)
wanted = x.double() @ reference.delta_weight(delta.coefficients.double(), far, (1, 65_535), 1e5).T
close(y, wanted, 1e-6)

positions = torch.randperm(240, generator=generator)[:30]
delta = (randn(30), *fold(positions, 12, 20), 12, 20, 7.0)
BOTH = ["both_components", "coefficient_sums"]
x, dy, weight = randn(3, 20).bfloat16(), randn(3, 12).bfloat16(), randn(12, 20).bfloat16()
for operator, given, names in (
    (operators.linear_op, (x, weight, None, False), ["aten::mm", "components", "expand"]),
    (operators.linear_op, (x, None, None, False), ["components", "expand"]),
    (operators.linear_backward_op, (dy, None, weight, True, False), ["aten::mm", "components", "expand"]),
    (operators.linear_backward_op, (dy, x, weight, True, False), ["aten::mm", *BOTH, "expand"]),
    (operators.linear_backward_op, (dy, x, weight, False, True), BOTH),
):
    del counted.names[:]
    with counted:
        operator._init_fn(*given, *delta)
    assert counted.names == names, counted.names
print("equal")
"""
)
_BINS = (
    _HEAD
    + """
for real in (torch.float32, torch.float64):
    some = ((1, (5, 7), 3), (9, (65, 130), 200), (5, (64, 64), 1), (0, (3, 3), 2), (2, (1, 1), 1), (3, (4, 6), 24))
    for rows, shape, count in some:
        positions = torch.randperm(shape[0] * shape[1], generator=generator)[:count]
        delta = Delta(randn(count).to(real), fold(positions, *shape), shape, 3.0)
        for way in (0, 1):
            bins_in, bins = (shape[1 - way] // 2 + 1, shape[way] // 2 + 1)
            spectrum = torch.view_as_complex(torch.randn(rows, bins_in, 2, dtype=real, generator=generator))
            got = gather_scatter.mix_on_gpu(spectrum, delta, way, bins)
            torch.testing.assert_close(got, gather_scatter.mix(spectrum, delta, way, bins))
print("equal")
"""
)
_FOURA = (
    _HEAD
    + """
from copy import deepcopy
from spectral_surgery.adapters import on_gpu
from spectral_surgery.adapters.foura import Foura, FouraConfig

on_gpu.runs = lambda _: True
torch.cuda.is_current_stream_capturing = lambda: False
for (rows, columns), r in (((12, 20), 3), ((40, 97), 20)):
    for name in ("dct", "hartley", "dft"):
        gated = name != "hartley"
        adapter = Foura(FouraConfig(r=r, transform=name, init_weights=False, use_gate=gated), rows, columns)
        if gated:
            adapter(randn(40, columns))
            adapter.gate.rate[0] = 0
            adapter.freeze_gate()
        for dtype, limit in LIMITS:
            for leading in ((1,), (2, 5), (16,)):
                x = randn(*leading, 2 * columns).to(dtype)[..., ::2]
                with torch.no_grad():
                    assert on_gpu.update(x, adapter.train(), adapter.lora_factors, adapter.scaling) is None
                    y = on_gpu.update(x, adapter.eval(), adapter.lora_factors, adapter.scaling)
                    assert y.dtype == dtype
                    close(y, x.double() @ adapter.delta_weight().double().T, limit, rows, columns, name, leading)
        assert on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling) is None  # a gradient is wanted
        with torch.no_grad():
            assert on_gpu.update(randn(17, columns), adapter, adapter.lora_factors, adapter.scaling) is None
            before = on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling)
            assert torch.equal(on_gpu.update(x, deepcopy(adapter), adapter.lora_factors, adapter.scaling), before)
            like = torch.empty_like(adapter.B, device="meta")
            adapter.B.mul_(2)  # factors follow what parameters have
            close(on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling), 2 * before.double(), 1e-2)
            adapter.B.data.mul_(2)  # of which nobody is told
            adapter.train().eval()
            close(on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling), 4 * before.double(), 1e-2)
            adapter.scaling *= 3
            close(on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling), 12 * before.double(), 1e-2)
            adapter.scaling /= 3
            for _ in range(4):  # another parameter may get the memory of one that is gone
                on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling)
                adapter.B = None
                adapter.B = torch.nn.Parameter(torch.randn(like.shape, dtype=like.dtype, generator=generator))
                wanted = x.double() @ adapter.delta_weight().double().T
                close(on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling), wanted, limit)
            torch.cuda.is_current_stream_capturing = lambda: True
            assert on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling) is not None
            on_gpu.forget(adapter)
            assert on_gpu.update(x, adapter, adapter.lora_factors, adapter.scaling) is None  # of a graph
            torch.cuda.is_current_stream_capturing = lambda: False
x, down, up = randn(3, 20), randn(8, 20), randn(8, 12)
del counted.names[:]
with counted:
    on_gpu.low_rank(x, down, up)
assert counted.names == ["components", "expand"], counted.names
print("equal")
"""
)


@triton_only
@pytest.mark.slow
@pytest.mark.parametrize("program", [_WAVES, _BINS, _FOURA], ids=["waves", "bins", "foura"])
def test_values_and_launches_in_the_interpreter(program: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@triton_only
def test_few_tokens_are_those_that_take_less_time_than_ffts() -> None:
    def fits(tokens: int, side: int, count: int = 1000, dtype: torch.dtype = torch.bfloat16) -> bool:
        places = fold(torch.arange(count), side, side)
        return on_gpu.fits(tokens, dtype, Delta(torch.zeros(count), places, (side, side), 1.0))

    assert fits(1, 4096)
    assert fits(32, 4096)
    assert not fits(64, 4096)
    assert not fits(1, 4096, 10_000)
    assert fits(64, 768)
    assert not fits(0, 768)
    assert not fits(1, 768, dtype=torch.float64)
    assert not fits(1, (1 << 16) + 1, 10)


def error(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual.double().cpu()).norm() / expected.norm())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tokens", [1, 7, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, tokens: int) -> None:
    shape = (768, 1000)
    positions = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(0))[:3000]
    c = torch.randn(3000, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x, weight = (torch.randn(n, 1000, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (tokens, 768))
    delta = reference.delta_weight(c.double(), positions, shape, 3e4)
    expected = x.double() @ (weight.double() + delta).T
    folded, limit = fold(positions.cuda(), *shape), {torch.float32: 1e-5}.get(dtype, 2**-7)
    given = x.cuda().requires_grad_()
    got = adapted_linear(given, weight.cuda(), None, c.cuda(), folded, 3e4)
    assert error(expected.detach(), got.detach()) < limit
    assert error((x.double() @ delta.T).detach(), fourier_delta(x.cuda(), c.cuda(), folded, 768, 3e4).detach()) < limit
    dy = torch.randn(tokens, 768, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted, gradient = (torch.autograd.grad(y, c, g)[0] for y, g in ((expected, dy.double()), (got, dy.cuda())))
    assert error(wanted.double(), gradient) < limit
    assert error(delta.detach(), delta_weight(c.cuda(), folded, shape, 3e4).detach()) < 1e-5


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["dct", "hartley", "dft"])
def test_low_rank_on_a_gpu_and_in_a_graph(name: str) -> None:
    adapter = Foura(FouraConfig(r=8, transform=name, init_weights=False), 768, 1000).eval()  # type: ignore[arg-type]
    dense = adapter.delta_weight().detach().double()
    adapter = adapter.cuda()
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        x = torch.randn(4, 1000, device="cuda", dtype=dtype)
        with torch.no_grad():
            y = adapter(x)
            assert error(x.double().cpu() @ dense.T, y) < limit
            assert torch.equal(adapter(x), y)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = adapter(x)
            graph.replay()
            assert torch.equal(again, y)
