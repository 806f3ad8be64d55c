"""Five bits a weight: every product and look-up equals that of the weight, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery import matmul as op
from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul import level_form, matrix_job
from tests.support.spectra import TOLERANCE, by_token, noise, random_codes, relative


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("tokens", [3, 260])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products(kernels: bool, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch unpacks, block by block, and with outliers."""
    monkeypatch.setattr(level_form, "BLOCK", 50 * 112)
    if not kernels:
        monkeypatch.setattr(level_form, "read_levels", lambda *_: None)
    spectrum = random_codes(70, 112, 15, torch.int8)
    spectrum.codes[torch.arange(0, 70, 2), 5] = 40
    form, weight = op.resident_form(spectrum, "int5"), spectrum.to_dense(torch.float64)
    x, g = noise(tokens, 112).to(dtype), noise(tokens, 70).to(dtype)
    assert by_token(op.form_matmul(x, [form]), x.double() @ weight.T) < TOLERANCE[dtype]
    assert by_token(op.form_matmul_transposed(g, [form]), g.double() @ weight) < TOLERANCE[dtype]
    assert torch.equal(form.levels(torch.arange(70)), spectrum.codes)
    assert torch.equal(form.recorded_levels(), spectrum.codes)


def test_kernels_read_the_levels_of_every_form() -> None:
    for resident, high in (("int8", 127), ("int4", 7), ("int5", 15)):
        spectrum = random_codes(37, 144, high, torch.int8, offset=0.5 if resident == "int4" else 0.0)
        form = op.resident_form(spectrum, resident)
        levels = matrix_job.read_levels(form, 5, 30)  # type: ignore[arg-type]
        assert levels is not None
        assert torch.equal(levels, form.levels(torch.arange(5, 30)))


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="codes reach -60 to 60; expected -16 to 15"):
        op.resident_form(random_codes(64, 64, 60, torch.int8), "int5")


def test_widths_and_offsets_that_kernels_do_not_read() -> None:
    for columns, offset in ((40, 0.0), (64, 0.25), (1, 0.0), (17, 0.5)):
        spectrum = random_codes(70, columns, 15, torch.int8, offset=offset)
        form, x = op.resident_form(spectrum, "int5"), noise(3, columns)
        assert form.kind is None  # type: ignore[attr-defined]
        expected = x.double() @ spectrum.to_dense(torch.float64).T
        assert by_token(op.form_matmul(x, [form]), expected) < TOLERANCE[torch.float32]


def test_takes_five_bits() -> None:
    form = op.resident_form(random_codes(256, 256, 15, torch.int8), "int5")
    assert 8 * (form.codes.nbytes + form.lowest.nbytes) == 5 * 256 * 256  # type: ignore[attr-defined]
    assert (
        relative(op.form_matmul(noise(1, 256), [form]), noise(1, 256) @ torch.cat(list(op.dense_rows(form))).T) < 1e-6
    )
