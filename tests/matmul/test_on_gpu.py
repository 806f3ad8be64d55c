"""Products on a GPU: the values of the kernel in Triton's interpreter, and the kernel itself where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from spectral_surgery import matmul as op
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.rate import Target
from spectral_surgery.layers import SpectralLinear
from spectral_surgery.matmul import gpu_rules

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

_INTERPRETED = """
import sys
from dataclasses import replace

import torch
from spectral_surgery import matmul as op
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.rate import Target
from spectral_surgery.matmul import integer, on_gpu
from spectral_surgery.matmul.operator import dense_rows

generator = torch.Generator().manual_seed(0)
LIMITS = ((torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-11))

def randn(*shape):
    return torch.randn(*shape, generator=generator)

def close(got, wanted, limit, *what):
    error = float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))
    assert got.shape == wanted.shape and error < limit, (got.dtype, tuple(got.shape), error, *what)

for rows, terms in ((1, 5), (70, 540)):
    codes = torch.randint(-127, 128, (rows, terms), generator=generator).to(torch.int8)
    for dtype, _ in LIMITS:
        x, g = randn(3, terms).to(dtype), randn(19, rows).to(dtype)
        close(on_gpu.level_product(x, codes), x.double() @ codes.double().T, 4e-3, "levels")
        close(on_gpu.level_product(g, codes.T), g.double() @ codes.double(), 4e-3, "transposed")
    assert on_gpu.level_product(x[:0], codes).shape == (0, rows)

on_gpu.way = integer.way = lambda *_: "triton"
resident = sys.argv[1]
cases = (
    (130, 96, Basis("dct", 64, (0, 1))),
    (5, 48, Basis("hartley", 16, (0, 1))),
    (128, 256, Basis("hadamard", 128, (0, 1))),
    (70, 176, Basis("dct", 64, (1,))),
    (64, 560, Basis("dct", 16, (0,))),
    (66, 71, Basis("identity", 64, ())),
    (66, 96, Basis("dct", 48, (0, 1))),  # tiles that no block of rows is made of
)
for number, (rows, terms, basis) in enumerate(cases):
    weight = randn(rows, terms)
    weight[3, 9], weight[rows - 1, terms - 1] = 30, -25  # no nibble holds their codes
    encoded, _ = encode(weight, Target("bits", 2.5), basis)
    dense, bias = encoded.to_dense().double(), randn(rows)
    form = op.resident_form(encoded, resident)
    for dtype, limit in LIMITS:
        for tokens in ((3, 6, 13)[number % 3], 20):
            x = randn(tokens, terms).to(dtype)
            y = on_gpu.product(x, [form], bias)
            assert (y is None) == (basis.tile == 48 or (resident == "int5" and terms % 16 > 0))
            y = op.form_matmul(x, [form], bias.to(dtype))
            assert y.dtype == dtype
            close(y, x.double() @ dense.T + bias.to(dtype).double(), limit, rows, terms, resident, tokens)

encoded, _ = encode(randn(64, 64), Target("bits", 2.5))
x = torch.full((20, 64), 2e4).half()  # the sum of a tile is beyond float16
form = op.resident_form(encoded, resident)
small = replace(form, scale=form.scale / 1e3)
dense = torch.cat(list(dense_rows(small))).double()
for tokens in (3, 20):
    close(op.form_matmul(x[:tokens], [small]), x[:tokens].double() @ dense.T, 2**-11, "large", tokens)
    for scale in (1e-25, 1e25):  # digits of very small and of very large numbers
        some = randn(tokens, 64)
        wanted = some.double() @ encoded.to_dense().double().T
        close(on_gpu.product(some * scale, [form], None).double() / scale, wanted, 2e-6, scale)
for wrong in (float("nan"), float("inf")):
    x = randn(3, 64)
    x[1, 5] = wrong
    y = on_gpu.product(x, [form], None)
    assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()

encoded, _ = encode(randn(130, 96), Target("bits", 2.5))
form = op.resident_form(encoded, resident)
scaled = replace(form, scale=randn(96).abs(), row_scale=randn(130).abs())
x, dense = randn(5, 96), torch.cat(list(dense_rows(scaled))).double()
close(op.form_matmul(x, [scaled]), x.double() @ dense.T, 2e-6, "scales")
close(op.form_matmul(x, [scaled, scaled]), x.double() @ torch.cat([dense, dense]).T, 2e-6, "two forms")

x = randn(3, 96).requires_grad_()
y = op.form_matmul(x, [form])
close(y, x.double() @ encoded.to_dense().double().T, 1e-5)
close(torch.autograd.grad(y.sum(), x)[0], encoded.to_dense().double().sum(0).expand(3, -1), 1e-5)
print("equal")
"""

_EXPERTS = """
import sys
from dataclasses import replace
import torch
from spectral_surgery import matmul as op
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.rate import Target
from spectral_surgery.layers import SpectralExperts, SpectralWeight
from spectral_surgery.matmul import integer, on_gpu
import spectral_surgery.gpu.experts as kernel

generator = torch.Generator().manual_seed(0)
launches = []
run = kernel.experts.run
kernel.experts.run = lambda *args, **options: (launches.append(options["grid"]), run(*args, **options))[1]
on_gpu.way = integer.way = lambda *_: "triton"
for resident in sys.argv[1:]:
    for rows, terms in ((70, 96),):
        weights, dense = [], []
        for expert in range(4):
            weight = torch.randn(rows, terms, generator=generator)
            if expert == 1:
                weight[3, 9] = 30  # an outlier that the others do not have
            encoded, _ = encode(weight, Target("bits", 2.5), Basis())
            weights.append(SpectralWeight.from_spectra(encoded, resident))
            dense.append(encoded.to_dense().double())
        experts = SpectralExperts(weights)
        for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
            for counts in ((2, 1, 0, 5), (0, 0, 1, 0)):
                x = torch.randn(sum(counts), terms, generator=generator).to(dtype)
                parts = x.double().split(list(counts))
                wanted = torch.cat([part @ matrix.T for part, matrix in zip(parts, dense)])
                del launches[:]
                y = experts(x, counts)
                assert len(launches) == 1 and launches[0][2] == sum(count > 0 for count in counts), launches
                assert y.dtype == dtype
                assert float((y.double() - wanted).norm() / wanted.norm()) < limit, (resident, dtype)
                alone = torch.cat([weight.matmul(part.to(dtype)) for weight, part in zip(weights, parts) if len(part)])
                assert float((y.double() - alone.double()).norm() / wanted.norm()) < limit
        x = torch.randn(8, terms, generator=generator).requires_grad_()
        y = experts(x, (2, 1, 0, 5))
        assert len(launches) == 1  # gradients come from each expert by itself
        (gradient,) = torch.autograd.grad(y.sum(), x)
        wanted = torch.cat([matrix.sum(0).expand(count, -1) for matrix, count in zip(dense, (2, 1, 0, 5))])
        assert float((gradient.double() - wanted).norm() / wanted.norm()) < 1e-5
    other = SpectralWeight.from_spectra(encoded, "int12")
    assert on_gpu.expert_products(x.detach(), [weight.forms for weight in (*weights[:3], other)], (2, 1, 0, 5)) is None
    assert on_gpu.expert_products(x.detach()[:0], [weight.forms for weight in weights], (0, 0, 0, 0)) is None
    many = torch.randn(20, terms, generator=generator)
    assert on_gpu.expert_products(many, [weight.forms for weight in weights], (17, 3, 0, 0)) is None
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "resident"),
    [*((_INTERPRETED, name) for name in ("int8", "int4", "int5", "int12")), (_EXPERTS, "int8"), (_EXPERTS, "int4")],
    ids=["int8", "int4", "int5", "int12", "experts of int8", "experts of int4"],
)
def test_values_in_the_interpreter(program: str, resident: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, resident]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.parametrize("chip", ["8.0", "8.6", "9.0", "10.0", "amd", "rdna"])
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_terms_are_shared_only_where_rows_do_not_fill_a_chip(tokens: int, chip: gpu_rules.Chip) -> None:
    def cut(rows: int, columns: int, tile: int = 64) -> gpu_rules.Cut:
        planes = gpu_rules.Planes(BYTES=False, NIBBLES=True, BITS=False)
        matrix = gpu_rules.Matrix(rows, columns, planes, Basis("dct", tile, (0, 1)))
        return gpu_rules.few_cut(matrix, tokens, torch.bfloat16, chip)

    usual = cut(4096, 4096)
    assert 128 <= -(-4096 // (usual.rows * usual.blocks)) * usual.splits <= 512
    assert cut(4096, 128).splits == cut(152_000, 4096).splits == 1
    assert not cut(100, 100, 128).rows % 128
    assert usual.tokens == {1: 8 if chip in ("10.0", "amd", "rdna") else 4, 8: 8, 16: 16}[tokens]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
@pytest.mark.parametrize("resident", op.RESIDENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(resident: str, dtype: torch.dtype, tokens: int) -> None:
    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    encoded, _ = encode(weight, Target("bits", 2.5), Basis())
    layer = SpectralLinear.from_quantized(encoded, resident=resident).cuda()
    x = torch.randn(tokens, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = x.cuda()
    dense = encoded.to_dense().double()
    limit = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    expected = x.double() @ dense.T
    with torch.no_grad():
        y = layer(given)
        assert float((y.double().cpu() - expected).norm() / expected.norm()) < limit
        assert torch.equal(y, layer(given))  # programs that share rows add up in one order
    y = layer(given.requires_grad_())
    assert float((y.detach().double().cpu() - expected).norm() / expected.norm()) < limit
    (gradient,) = torch.autograd.grad(y.float().sum(), given)
    wanted = dense.sum(0).expand(tokens, -1)
    assert float((gradient.double().cpu() - wanted).norm() / wanted.norm()) < 5 * limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_streams_and_a_graph() -> None:
    encoded, _ = encode(torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)), Target("bits", 2.5))
    layer = SpectralLinear.from_quantized(encoded, resident="int8").cuda()
    x = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        for _ in range(20):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected) for result in results)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)
