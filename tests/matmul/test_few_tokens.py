"""The short way of a few tokens on a CPU gives the bits of the general one, and leaves all else to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spectral_surgery import matmul as op
from spectral_surgery.matmul import few_tokens, int4
from tests.support.spectra import TOLERANCE, noise, random_codes, relative


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread", "processor")
@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,)])
@pytest.mark.parametrize("settings", [{}, {"transform": "identity"}, {"transform": "hadamard"}])
@pytest.mark.parametrize("resident", ["int8", "int4"])
def test_a_few_tokens_give_the_same_bits(
    axes: tuple[int, ...], settings: dict[str, str], resident: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short way is the general one, for what it takes; all else is left to that."""
    monkeypatch.setattr(int4, "_BLOCK", 50 * 128)
    high = 60 if resident == "int8" else 7
    for rows, columns, length in ((192, 128, 9), (192, 96, 16), (200, 128, 1), (64, 128, 8), (1, 32, 1)):
        spectrum = random_codes(rows, columns, high, torch.int8, axes=axes, tile=64, **settings)
        form = op.resident_form(spectrum, resident)
        x = noise(length, columns).bfloat16()
        for tokens in {1, min(length, 8), length}:
            some = x[:tokens].reshape(tokens, 1, columns)
            quick = few_tokens.few_tokens(some, form)
            general = op.form_matmul(some.clone().requires_grad_(), [form])
            if quick is not None:
                assert (quick.dtype, quick.shape) == (torch.float32, (tokens, 1, rows))
                assert torch.equal(quick, general.to(quick.dtype))
            assert torch.equal(op.form_matmul(some, [form]), general)
    aligned = op.resident_form(random_codes(192, 128, high, torch.int8, axes=axes, tile=64, **settings), resident)
    x = noise(8, 128).bfloat16()
    assert few_tokens.few_tokens(x, aligned) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert few_tokens.few_tokens(x, aligned) is None
    others = (x.clone().requires_grad_(), x.float(), x[:0], x[:, :64], noise(40, 128).bfloat16(), x.to("meta"))
    assert [few_tokens.few_tokens(own, aligned) for own in others] == [None] * len(others)


@pytest.mark.usefixtures("one_thread", "processor")
@pytest.mark.parametrize("resident", ["int8", "int4"])
def test_a_step_for_every_column(resident: str) -> None:
    steps = 0.01 * (1 + torch.arange(128) % 5)
    spectrum = random_codes(192, 128, 7, torch.int8, tile=64, step=steps, offset=0.5)
    form, x = op.resident_form(spectrum, resident), noise(3, 128).bfloat16()
    quick = few_tokens.few_tokens(x, form)
    assert quick is not None
    assert relative(quick, x.double() @ spectrum.to_dense().double().T) < TOLERANCE[torch.bfloat16]
    assert torch.equal(quick, op.form_matmul(x.clone().requires_grad_(), [form]))
