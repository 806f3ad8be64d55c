"""Triton kernels of the spectral products: their values in the interpreter, and themselves on a GPU."""

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
from spectral_surgery.matmul import triton

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

_INTERPRETED = """
import torch
from spectral_surgery import matmul as op
from spectral_surgery.matmul import integer, triton
from spectral_surgery.matmul.level_form import LevelForm
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target

generator = torch.Generator().manual_seed(0)

def close(got, wanted, limit):
    error = float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))
    assert got.shape == wanted.shape and error < limit, (got.dtype, tuple(got.shape), error)

for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 2e-3)):  # the interpreter multiplies bfloat16 as integers
    for tokens, rows, terms in ((1, 5, 33), (3, 70, 600), (20, 130, 70), (0, 4, 8)):
        x = torch.randn(tokens, terms, generator=generator).to(dtype)
        y = torch.randn(tokens, rows, generator=generator).to(dtype)
        matrix = torch.randint(-127, 128, (rows, terms), generator=generator).to(torch.int8)
        got = triton.product(x, matrix, dtype)
        assert got.dtype == dtype
        close(got, x.double() @ matrix.double().T, limit)
        close(triton.product(y, matrix.T, torch.float32), y.double() @ matrix.double(), 1e-6)
        packed = torch.randint(-128, 128, (rows, -(-terms // 2)), generator=generator).to(torch.int8)
        for grid in ((1, 0), (10, -1)):
            none = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int8)
            scales = torch.ones(1), torch.empty(0), torch.tensor(grid, dtype=torch.int8)
            form = LevelForm(packed, packed[:, :0], *scales, *none, Basis(), (rows, terms), "int4")
            wanted = x.double() @ form.levels(torch.arange(rows)).double().T
            close(triton.packed_product(x, packed, form.grid), wanted, limit)

integer.way = lambda *_, **__: "triton"
weight = torch.randn(130, 96, generator=generator)
weight[7, 9] = 30  # no nibble holds its code
encoded, _ = encode(weight, Target("bits", 2.5))
x = torch.randn(3, 96, generator=generator, requires_grad=True)
for resident in op.RESIDENTS:
    y = op.form_matmul(x, [op.resident_form(encoded, resident)])
    close(y, x.double() @ encoded.to_dense().double().T, 1e-5)
    close(torch.autograd.grad(y.sum(), x)[0], encoded.to_dense().double().sum(0).expand(3, -1), 1e-5)
print("equal")
"""


@pytest.mark.slow
def test_values_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _INTERPRETED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("tokens", [1, 16, 17, 512])
def test_terms_are_split_only_where_blocks_are_few(tokens: int) -> None:
    cut = triton.blocks(tokens, 4096, 4096)
    programs = -(-tokens // cut.tokens) * -(-4096 // cut.rows) * cut.splits
    assert programs >= 256
    assert (cut.splits > 1) == (tokens < 512)
    assert triton.blocks(tokens, 4096, 16).splits == 1
    assert triton.blocks(0, 4096, 16).splits == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
@pytest.mark.parametrize("resident", op.RESIDENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(resident: str, dtype: torch.dtype, tokens: int) -> None:
    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    encoded, _ = encode(weight, Target("bits", 2.5), Basis())
    from spectral_surgery.layers import SpectralLinear

    layer = SpectralLinear.from_quantized(encoded, resident=resident).cuda()
    x = torch.randn(tokens, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = x.cuda().requires_grad_()
    y = layer(given)
    dense = encoded.to_dense().double()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    expected = x.double() @ dense.T
    assert float((y.detach().double().cpu() - expected).norm() / expected.norm()) < limit
    (gradient,) = torch.autograd.grad(y.float().sum(), given)
    wanted = dense.sum(0).expand(tokens, -1)
    assert float((gradient.double().cpu() - wanted).norm() / wanted.norm()) < limit
