"""Rows of a weight from a kernel, beside those that torch decodes."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery import matmul as op
from spectral_surgery.matmul import look_up
from tests.support.spectra import random_codes, relative


@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,)])
@pytest.mark.parametrize("transform", ["dct", "identity", "hadamard"])
@pytest.mark.parametrize(("resident", "high"), [("int8", 60), ("int4", 7), ("int5", 15)])
def test_rows_are_those_of_the_weight(axes: tuple[int, ...], transform: str, resident: str, high: int) -> None:
    for number, (rows, columns) in enumerate(((130, 128), (64, 80), (7, 112), (200, 96))):
        steps = 0.01 * (1 + torch.arange(columns) % 5) if number == 3 else torch.tensor([0.01])
        offset = 0.5 if number % 2 and resident == "int4" else 0.0
        settings = {"axes": axes, "transform": transform, "step": steps, "offset": offset}
        spectrum = random_codes(rows, columns, high, torch.int8, **settings)
        if resident != "int8":
            spectrum.codes[torch.arange(0, rows, 5), 3] = 2 * high + 3  # beyond nibbles, or five bits
        form, ids = op.resident_form(spectrum, resident), torch.tensor([0, rows - 1, 3, 3, rows // 2])
        found = look_up(form, ids)
        assert found is not None
        assert relative(found, spectrum.to_dense()[ids]) < 1e-6
    assert look_up(form, ids[:0]).shape == (0, 96)


def test_what_is_left_to_torch() -> None:
    ids = torch.tensor([1])
    assert look_up(op.resident_form(random_codes(64, 64, 7, torch.int8), "coded"), ids) is None
    assert look_up(op.resident_form(random_codes(64, 31, 7, torch.int8), "int8"), ids) is None
    assert look_up(op.resident_form(random_codes(64, 99, 7, torch.int8), "int4"), ids) is None
    assert look_up(op.resident_form(random_codes(64, 64, 7, torch.int8), "int8"), ids.to("meta")) is None
