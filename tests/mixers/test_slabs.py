"""Slabs and layouts change neither values nor gradients."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.mixers import slabs
from spectral_surgery.mixers.layout import swap
from spectral_surgery.mixers.slabs import in_slabs
from tests.mixers.cases import BIDIRECTIONAL, WIDTH, random_mixer, tokens


@pytest.mark.parametrize("name", BIDIRECTIONAL)
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


def test_slices_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB", 8)
    x, y = tokens(4, 7), tokens(7, 3)
    sizes = []

    def product(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        sizes.append((tuple(part.shape), tuple(other.shape)))
        return part * other.sum(1)

    with torch.no_grad():
        assert torch.equal(in_slabs(product, (x, y), (1, 0)), x * y.sum(1))
    assert sizes == [((4, 2), (2, 3))] * 3 + [((4, 1), (1, 3))]


def test_swap() -> None:
    x = tokens(3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.equal(swap(x), x.transpose(1, 2))
    assert swap(x).is_contiguous()
    assert torch.autograd.gradcheck(swap, x)
    assert torch.equal(swap(x.transpose(1, 2)), x)
