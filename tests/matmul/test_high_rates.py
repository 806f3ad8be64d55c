"""Levels that a byte does not hold: a few beside int8, many as 12 bits; products are exact all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spectral_surgery import matmul as op
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError
from spectral_surgery.kernels.outliers import add_product
from spectral_surgery.layers import SpectralConv1D
from spectral_surgery.matmul import outliers as beyond
from spectral_surgery.matmul import recorded
from tests.support.spectra import TOLERANCE, by_token, noise, random_codes, relative

SHAPE = (300, 333)


def with_outliers(share: int, size: int, high: int = 100, **settings: Any) -> QuantizedSpectrum:
    """One code in ``share`` is beyond ``high``, up to ``size``."""
    spectrum = random_codes(*SHAPE, high, torch.int32, **settings)
    flat = spectrum.codes.view(-1)
    places = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(2))[: flat.numel() // share]
    flat[places] = torch.tensor([128, -128, size, -size], dtype=torch.int32).repeat(len(places))[: len(places)]
    return spectrum


FORMS = {
    "int8": with_outliers(100, 90_000),
    "int8, offset": with_outliers(3000, 500, 40, offset=0.5),
    "int8, columns": with_outliers(3000, 500, step=0.01 * (1 + torch.arange(333) % 5)),
    "int12": with_outliers(5000, 90_000, 2039),
    "int12, offset": with_outliers(5000, 2100, 1000, offset=0.5),
    "streamed": with_outliers(100, 90_000),
}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("name", FORMS)
def test_every_product_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "_AT_ONCE", 80)  # several parts
    spectrum, resident = FORMS[name], name.partition(",")[0]
    form, dense = op.resident_form(spectrum, resident), spectrum.to_dense().double()
    assert len(form.places) > 5  # type: ignore[attr-defined]
    for dtype, most in TOLERANCE.items():
        for tokens in (1, 9, 16, 40, 260):
            x, g = noise(tokens, 333).to(dtype), noise(tokens, 300).to(dtype)
            assert by_token(op.form_matmul(x, [form]), x.double() @ dense.T) < most
            assert by_token(op.form_matmul_transposed(g, [form]), g.double() @ dense) < most
            assert relative(recorded.product(x, [form]), x.double() @ dense.T) < most
            assert relative(recorded.product(g, [form], transposed=True), g.double() @ dense) < most
    assert op.form_matmul(noise(0, 333), [form]).shape == (0, 300)
    rows = torch.tensor([299, 5, 5, 0, *range(300)])
    exact = spectrum.codes.double() + spectrum.offset * spectrum.codes.sign()
    parts = spectrum.step.double() / form.scale.double()  # of a step
    assert torch.equal((form.levels(rows).double() / parts).float(), exact[rows].float())
    assert torch.equal(form.recorded_levels().double(), form.levels(torch.arange(300)).double())
    x = noise(2, 333).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op.form_matmul(x, [form]), (x,), fast_mode=True)


def test_a_kernel_for_a_few_tokens() -> None:
    """Beside the plain way: rows without outliers, several in one, and the last place."""
    places = torch.tensor([0, 3, 3 * 7 + 6, 5 * 7, 9 * 7 + 6], dtype=torch.int32)
    values = torch.tensor([3.0, -2.0, 500.0, 1.0, -7.0])
    sparse = torch.zeros(10, 7).view(-1).index_put((places.long(),), values).view(10, 7)
    for tokens in (0, 1, 16):
        x, y = noise(tokens, 7), noise(tokens, 10, seed=1)
        expected = y + x @ sparse.T
        assert torch.allclose(beyond.add_product(y, x, places, values, 7), expected, rtol=1e-6, atol=1e-4)
        kernel = y.numpy().copy()
        add_product(kernel, np.ascontiguousarray(x.T.numpy()), places.long().numpy(), values.to(torch.int8).numpy())
        wanted = y + x @ sparse.to(torch.int8).float().T
        assert torch.allclose(torch.from_numpy(kernel), wanted, rtol=1e-6, atol=1e-4)
        assert torch.equal(y, noise(tokens, 10, seed=1))


def test_too_many_codes_beyond() -> None:
    with pytest.raises(ConfigError, match=r"reach -500 to 500; expected -127 to 127 .*, but for one code in 64. Use"):
        op.resident_form(with_outliers(60, 500), "int8")
    with pytest.raises(ConfigError, match=r"reach -5000 to 5000; expected -2039 to 2039 .*for one code in 4096. Use"):
        op.resident_form(with_outliers(1000, 5000), "int12")
    with pytest.raises(ConfigError, match=r"an offset of 0.00123 steps is on no grid of int8"):
        op.resident_form(with_outliers(5000, 500, offset=0.00123), "int8")


def test_laid_out_transposed() -> None:
    spectrum = with_outliers(100, 500)
    layer = SpectralConv1D.from_quantized(spectrum)
    form = layer.spectrum.forms[0]
    assert layer.transposed
    assert len(form.places) > 100  # type: ignore[attr-defined]
    assert bool((form.places.diff() > 0).all())  # type: ignore[attr-defined]
    x = noise(3, 300)
    assert relative(layer(x), x @ spectrum.to_dense()) < 1e-6


@pytest.mark.parametrize("quantizer", ["lattice", "scalar"])
@pytest.mark.parametrize("tails", ["gaussian", "heavy"])
@pytest.mark.parametrize("bits", [6.0, 7.0, 8.0])
def test_every_rate_has_a_fast_form(quantizer: str, tails: str, bits: float) -> None:
    weight = noise(256, 320) if tails == "gaussian" else noise(256, 320) / noise(256, 320, seed=3).abs().clamp_min(0.02)
    encoded, _ = encode(weight, Target("bits", bits), quantizer=quantizer)
    for resident in ("int8", "int12"):
        try:
            form = op.resident_form(encoded, resident)
            break
        except ConfigError:
            continue
    x = noise(3, 320)
    assert relative(op.form_matmul(x, [form]), x @ encoded.to_dense().T) < 1e-6
