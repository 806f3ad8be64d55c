"""Operators of torch.compile: what torch asks of them, and graphs without a break that give the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spectral_surgery import matmul as op
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear
from spectral_surgery.matmul import RESIDENTS, custom_op
from tests.support.spectra import noise, random_codes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of opcheck
@pytest.mark.parametrize("resident", RESIDENTS)
def test_operators_are_what_torch_expects(resident: str) -> None:
    """Schema, fake results, and gradients under every kind of tracing."""
    forms = op.resident_forms([random_codes(48, 64, 7, torch.int8), random_codes(24, 64, 7, torch.int8)], resident)
    flat: tuple[Any, ...] = custom_op._flat(forms)
    product, rows = torch.ops.spectral_surgery.product.default, torch.ops.spectral_surgery.rows.default
    x, g, bias = noise(3, 64).requires_grad_(), noise(2, 5, 72).requires_grad_(), noise(72).requires_grad_()
    for given in ((x, bias, *flat, False), (g, None, *flat, True)):
        torch.library.opcheck(product, given)
    torch.library.opcheck(rows, (torch.tensor([[0, 71], [3, 3]]), *flat))


@pytest.mark.parametrize("resident", RESIDENTS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_with_the_same_numbers(resident: str, backend: str) -> None:
    torch._dynamo.reset()
    spectra = [random_codes(48, 64, 7, torch.int8)]
    layers = nn.ModuleList(
        [
            SpectralLinear.from_quantized(spectra, noise(48), resident),
            SpectralConv1D.from_quantized(spectra, noise(64), resident),
            SpectralEmbedding.from_quantized(spectra, resident),
        ]
    )

    def run(x: torch.Tensor, g: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return layers[0](x).sum() + layers[1](g).square().sum() + layers[2](ids).sum()

    results = []
    for function in (run, torch.compile(run, backend=backend, fullgraph=True)):
        x, g = noise(3, 64).requires_grad_(), noise(5, 48).requires_grad_()
        y = function(x, g, torch.tensor([[3, 0], [47, 1]]))
        y.backward()
        results.append((y.detach(), x.grad, g.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("both_ways")
def test_a_compiled_layer_takes_any_number_of_tokens() -> None:
    torch._dynamo.reset()
    layer = SpectralLinear.from_quantized(random_codes(48, 64, 7, torch.int8))
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (1, 5, 16, 260):
            x = noise(2, tokens, 64)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
