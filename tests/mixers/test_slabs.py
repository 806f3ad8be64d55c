"""Slabs and layouts change neither values nor gradients."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.mixers import slabs
from spectral_surgery.mixers.layout import transpose_tokens
from spectral_surgery.mixers.slabs import channel_slabs, token_slabs
from tests.mixers.cases import BIDIRECTIONAL, WIDTH, random_mixer, tokens


@pytest.mark.parametrize("name", [*BIDIRECTIONAL, "causal_fnet"])
@pytest.mark.parametrize("slab", [1, 300])
def test_mixers_in_slabs(name: str, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = random_mixer(name), tokens(2, 33, WIDTH).requires_grad_()
    inputs = (x, *mixer.parameters())
    whole = mixer(x)
    gradients = torch.autograd.grad(whole.square().sum(), inputs)
    monkeypatch.setattr(slabs, "SLAB", slab)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), whole, rtol=0, atol=1e-6)
    y = mixer(x)
    torch.testing.assert_close(y, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slab", [1, 40, 80, 130, 400, 2000])
def test_a_run_of_channels_is_a_part_of_a_group_or_whole_ones(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB", slab)
    runs = channel_slabs(tokens(2, 5, 36), 12)
    assert [number for run in runs for number in range(run.start, run.stop)] == list(range(36))
    for run in runs:
        assert run.start // 12 == (run.stop - 1) // 12 or run.start % 12 == run.stop % 12 == 0


@pytest.mark.parametrize("slab", [1, 40, 400, 2000])
def test_runs_of_tokens_start_at_multiples(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB", slab)
    runs = token_slabs(tokens(2, 33, 3), 29, multiple=6)
    assert [number for run in runs for number in range(run.start, run.stop)] == list(range(29))
    assert not any(run.start % 6 for run in runs)


def test_swap() -> None:
    x = tokens(3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.equal(transpose_tokens(x), x.transpose(1, 2))
    assert transpose_tokens(x).is_contiguous()
    assert torch.autograd.gradcheck(transpose_tokens, x)
    assert torch.equal(transpose_tokens(x.transpose(1, 2)), x)
