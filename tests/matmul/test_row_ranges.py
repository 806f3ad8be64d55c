"""Row ranges of a matrix with steps and offsets that differ are one form, in which all is as in forms of their own."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace

import pytest
import torch

from spectral_surgery import matmul as op
from spectral_surgery.codec.encoded import EncodedSpectrum
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.layers import SpectralLinear, SpectralWeight
from spectral_surgery.layers.trainable import TrainableWeight
from spectral_surgery.matmul import recorded
from spectral_surgery.matmul.code_blocks import as_encoded
from spectral_surgery.matmul.form import coefficients
from tests.support.spectra import TOLERANCE, by_token, noise, random_codes, relative

COLUMNS = 96


def ranges(*offsets: float, high: int = 7) -> list[QuantizedSpectrum]:
    """Of 64 rows each, the last one of 50; every one has a step."""
    parts = [
        random_codes(64, COLUMNS, high, torch.int8, offset=offset, tile=32, step=torch.tensor([0.01 * (1 + 0.3 * n)]))
        for n, offset in enumerate(offsets)
    ]
    return [*parts[:-1], replace(parts[-1], codes=parts[-1].codes[:50])]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("resident", op.RESIDENTS)
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_steps_differ(resident: str, offset: float) -> None:
    parts = ranges(offset, offset, offset)
    dense = torch.cat([part.to_dense() for part in parts]).double()
    (form,) = op.resident_forms(parts, resident)
    assert (form.shape, form.row_scale.shape) == ((178, COLUMNS), (178,))
    exact = torch.cat([part.coefficients() for part in parts])
    torch.testing.assert_close(coefficients(form, torch.arange(178)), exact, rtol=3e-7, atol=0)
    for dtype, most in TOLERANCE.items():
        for tokens in (1, 3, 40, 260):
            x, g = noise(tokens, COLUMNS).to(dtype), noise(tokens, 178).to(dtype)
            assert by_token(op.form_matmul(x, [form]), x.double() @ dense.T) < most
            assert by_token(op.form_matmul_transposed(g, [form]), g.double() @ dense) < most
            if resident != "coded":
                assert relative(recorded.product(x, [form]), x.double() @ dense.T) < most
                assert relative(recorded.product(g, [form], transposed=True), g.double() @ dense) < most
    ids = torch.tensor([177, 0, 63, 64, 130])
    weight = SpectralWeight([form], resident)
    assert relative(weight.rows(ids), dense[ids]) < 1e-6
    assert relative(weight.to_dense(), dense) < 1e-6
    if resident != "coded":
        assert relative(recorded.rows(ids, [form]), dense[ids]) < 1e-6
    x = noise(2, COLUMNS).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op.form_matmul(x, [form]), (x,), fast_mode=True)


def test_offsets_differ() -> None:
    parts = ranges(0.0, 0.5, 0.25)
    dense = torch.cat([part.to_dense() for part in parts])
    (form,) = op.resident_forms(parts, "int8")
    x = noise(3, COLUMNS)
    assert relative(op.form_matmul(x, [form]), x @ dense.T) < 1e-6
    for resident in ("int4", "coded", "streamed"):  # which have one offset each
        forms = op.resident_forms(parts, resident)
        assert len(forms) == 3
        assert relative(op.form_matmul(x, forms), x @ dense.T) < 1e-6


def test_steps_of_columns() -> None:
    steps = 0.01 * (1 + torch.arange(COLUMNS) % 5)
    parts = [replace(part, step=steps) for part in ranges(0.0, 0.5)]
    dense = torch.cat([part.to_dense() for part in parts])
    (form,) = op.resident_forms(parts, "int8")
    assert (form.scale.shape, form.row_scale.shape) == ((COLUMNS,), (114,))  # offsets in different parts of a step
    x = noise(3, COLUMNS)
    assert relative(op.form_matmul(x, [form]), x @ dense.T) < 1e-6
    (form,) = op.resident_forms([replace(part, offset=0.5) for part in parts], "int4")
    assert (form.scale.shape, form.row_scale.shape) == ((COLUMNS,), (0,))
    parts[1] = replace(parts[1], step=steps.flip(0))
    assert len(op.resident_forms(parts, "int8")) == 2


@pytest.mark.parametrize("change", [{"transform": "hartley"}, {"tile": 16}, {"axes": (1,)}])
def test_what_has_another_basis_is_another_form(change: dict[str, object]) -> None:
    parts = ranges(0.0, 0.0, 0.0)
    parts[1] = replace(parts[1], **change)  # type: ignore[arg-type]
    forms = op.resident_forms(parts, "int8")
    assert len(forms) == 3
    dense = torch.cat([part.to_dense() for part in parts])
    x = noise(3, COLUMNS)
    assert relative(op.form_matmul(x, forms), x @ dense.T) < 1e-6


def test_no_form_begins_within_a_tile() -> None:
    parts = ranges(0.0, 0.0, 0.0)
    assert len(op.resident_forms([parts[2], parts[0], parts[1]], "int8")) == 2
    along_rows = [replace(part, axes=(1,)) for part in (parts[2], parts[0], parts[1])]
    assert len(op.resident_forms(along_rows, "int8")) == 1


@pytest.mark.parametrize("resident", op.RESIDENTS)
def test_stored_codes_are_read_when_they_are_needed(resident: str) -> None:
    parts = [as_encoded(part) for part in ranges(0.0, 0.0, 0.0)]
    read: list[int] = []

    def part(number: int) -> EncodedSpectrum:
        read.append(number)
        return parts[number]

    (form,) = op.resident_forms([replace(part, frames=()) for part in parts], resident, part)
    assert read == [0, 1, 2]
    whole = torch.arange(178)
    assert torch.equal(coefficients(form, whole), coefficients(op.resident_forms(parts, resident)[0], whole))


@pytest.mark.parametrize("resident", op.RESIDENTS)
def test_copies_and_state_dicts(resident: str) -> None:
    """Of a layer whose rows have scales, also into one whose rows have none."""
    layer = SpectralLinear.from_quantized(ranges(0.0, 0.0, 0.0), resident=resident)
    alike = [replace(part, step=torch.tensor([0.02])) for part in ranges(0.0, 0.0, 0.0)]
    other = SpectralLinear.from_quantized(alike, resident=resident)
    assert len(layer.spectrum.parts) == len(other.spectrum.parts) == 1
    x = noise(3, COLUMNS)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert not torch.equal(other(x), layer(x))
    back, file = other.weight, io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.weight, back)
    assert layer.half().spectrum.forms[0].row_scale.dtype == torch.float32


def test_training_starts_from_it() -> None:
    parts = ranges(0.0, 0.0, 0.0)
    weight = SpectralWeight.from_spectra(parts, "int8")
    trainable = TrainableWeight(weight)
    assert relative(trainable.to_dense().detach(), weight.to_dense()) < 1e-6
    again = trainable.settled("int8")
    assert len(again.parts) == 1
    assert relative(again.to_dense(), weight.to_dense()) < 1e-6
