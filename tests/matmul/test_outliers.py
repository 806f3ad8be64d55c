"""Codes that half a byte does not hold: products are exact all the same, as long as they are few."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectral_surgery import matmul as op
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul import outliers as beyond
from tests.support.spectra import TOLERANCE, noise, random_codes, relative


def with_outliers(share: int, dtype: torch.dtype, **settings: Any) -> QuantizedSpectrum:
    """One code in ``share`` is beyond a nibble."""
    spectrum = random_codes(300, 333, 7, dtype, **settings)
    flat = spectrum.codes.view(-1)
    places = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(2))[: flat.numel() // share]
    flat[places] = torch.tensor([8, -9, 60, -50], dtype=dtype).repeat(len(places))[: len(places)]
    return spectrum


@pytest.mark.usefixtures("both_ways")
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("resident", ["int4", "streamed"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("offset", [0.0, -0.5, 26.0])
def test_a_few_codes_beyond_half_a_byte(
    resident: str, dtype: torch.dtype, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beyond, "_AT_ONCE", 80)  # several parts, also of one outlier each
    spectrum = with_outliers(5000, dtype, offset=offset, tile=64)
    form, dense = op.resident_form(spectrum, resident), spectrum.to_dense().double()
    held = form.host.codes if resident == "streamed" else form.codes  # type: ignore[attr-defined]
    assert (held.shape, len(form.places)) == ((300, 167), 19)  # type: ignore[attr-defined]
    for tokens in (0, 1, 9, 40, 260):
        for kind, most in TOLERANCE.items():
            x, g = noise(tokens, 333).to(kind), noise(tokens, 300).to(kind)
            if tokens:
                assert relative(op.form_matmul(x, [form]), x.double() @ dense.T) < most
                assert relative(op.form_matmul_transposed(g, [form]), g.double() @ dense) < most
            assert op.form_matmul(x, [form]).shape == (tokens, 300)
    rows = torch.tensor([299, 5, 5, 0, *range(300)])
    expected = spectrum.codes[rows].double()
    expected += offset * expected.sign()
    torch.testing.assert_close(form.levels(rows).double() * form.scale.double(), expected * 0.01)
    assert form.levels(rows[:0]).shape == (0, 333)
    x = noise(2, 333).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op.form_matmul(x, [form]), (x,), fast_mode=True)


def test_too_many_codes_beyond_half_a_byte() -> None:
    assert len(op.resident_form(with_outliers(65, torch.int8), "int4").places) > 1500  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"reach -50 to 60; expected -8 to 7 .*, but for one code in 64. Use"):
        op.resident_form(with_outliers(60, torch.int8), "int4")
    with pytest.raises(ConfigError, match="reach -50 to 60; expected -8 to 7"):
        op.resident_form(with_outliers(5000, torch.int8, offset=68.0), "int4")  # 128 is no level of int8
    form = op.resident_form(with_outliers(65, torch.int8), "streamed")
    assert form.host.codes.shape == (300, 333)  # type: ignore[attr-defined]  # as int8: nothing stays on the device
