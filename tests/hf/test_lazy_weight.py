"""Views, products and look-ups of a lazy weight give what the dense one gives, and decode nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight, Rows, Stack
from spectral_surgery.layers import SpectralWeight

COLUMNS, HEIGHTS = 48, (40, 64, 24)  # parts, so that ranges of rows go across their ends


def weights() -> SpectralWeight:
    parts = [torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows)) for rows in HEIGHTS]
    return SpectralWeight.from_spectra([encode(part, Target("bits", 6))[0] for part in parts])


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: functional.linear(rows(2, 3, 48), w, rows(128)),
    "linear without bias": lambda w: functional.linear(rows(3, 48), w),
    "x @ w.T": lambda w: rows(2, 3, 48) @ w.T,
    "x @ w": lambda w: rows(3, 128) @ w,
    "w @ x": lambda w: w @ rows(48, 5),
    "w @ vector": lambda w: w @ rows(48),
    "vector @ w.t()": lambda w: rows(48) @ w.t(),
    "embedding": lambda w: functional.embedding(torch.tensor([[3, 127, 41]]), w),
    "rows by number": lambda w: w[torch.tensor([[-1, 0], [39, 104]])],
    "one row": lambda w: w[-5],
    "rows that cross parts": lambda w: functional.linear(rows(3, 48), w[30:110]),
    "x @ rows that cross parts": lambda w: rows(3, 80) @ w[30:110],
    "chunks": lambda w: torch.cat([functional.linear(rows(3, 48), part) for part in w.chunk(3)], 1),
    "an expert": lambda w: rows(3, 48) @ w.view(4, 32, 48)[2].T,
    "an expert by tensor": lambda w: rows(3, 48) @ w.view((-1, 32, 48))[torch.tensor(3)].mT,
    "batches": lambda w: torch.bmm(rows(4, 3, 32), w.view(4, 32, 48)),
    "batches with bias": lambda w: torch.baddbmm(rows(4, 1, 48), rows(4, 3, 32), w.view(4, 32, 48)),
    "batches, turned": lambda w: torch.matmul(rows(4, 3, 48), w.view(4, 32, 48).transpose(1, 2)),
    "some experts": lambda w: torch.bmm(rows(2, 3, 32), w.view(4, 32, 48)[1:3]),
    "unbound": lambda w: torch.stack([rows(3, 48) @ own.T for own in w.view(4, 32, 48).unbind()]),
    "permuted": lambda w: rows(2, 48) @ w.permute(1, 0),
    "in another type": lambda w: functional.linear(rows(3, 48).double(), w.double()),
    "detached": lambda w: rows(2, 48) @ w.detach().T,
    "one batch": lambda w: torch.bmm(rows(1, 2, 128), w.unsqueeze(0)),
}
DECODED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda w: w.sum(0),
    "plus": lambda w: w + 1,
    "columns": lambda w: w[:, 3:9] * 1,
    "every second row": lambda w: w[::2] * 1,
    "a mask": lambda w: w[torch.arange(128) % 3 == 0],
    "flat": lambda w: w.view(-1).clone(),
    "einsum with heads": lambda w: torch.einsum("ti,hoi->hot", rows(3, 48), w.view(4, 32, 48) * 2),
    "rows of a range": lambda w: w[30:110].mean(1),
    "experts": lambda w: w.view(4, 32, 48).abs(),
    "w @ w": lambda w: w @ w.T,
}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    for kind in (Rows, Stack):
        dense = kind.dense
        monkeypatch.setattr(kind, "dense", lambda own, dense=dense: found.append(own) or dense(own))
    return found


@pytest.mark.parametrize("name", [*KEPT, *DECODED])
def test_gives_what_the_dense_weight_gives(name: str, decoded: list[object]) -> None:
    call, weight = (KEPT | DECODED)[name], weights()
    lazy = LazyWeight.of(Rows.all(weight))
    ours, expected = call(lazy), call(weight.to_dense())
    assert type(ours) is Tensor
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    assert torch.allclose(ours, expected, atol=1e-4)
    assert bool(decoded) == (name in DECODED)


def test_views_look_like_views_of_the_dense_weight() -> None:
    weight = weights()
    lazy, dense = LazyWeight.of(Rows.all(weight)), weight.to_dense()
    for view in (lambda w: w.T, lambda w: w[30:70], lambda w: w.view(4, 32, 48), lambda w: w.view(4, 32, 48).mT):
        ours, expected = view(lazy), view(dense)
        assert isinstance(ours, LazyWeight)
        assert (ours.shape, ours.stride(), ours.dtype) == (expected.shape, expected.stride(), expected.dtype)
        torch.testing.assert_close(ours.data, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "x @ w", "rows that cross parts", "batches", "an expert"])
def test_gradients_reach_what_it_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grads = weights(), []
    for own in (LazyWeight.of(Rows.all(weight)), weight.to_dense()):
        made: list[Tensor] = []

        def leaf(*shape: int, made: list[Tensor] = made) -> Tensor:
            made.append(torch.ones(*shape).requires_grad_())
            return made[-1]

        monkeypatch.setitem(globals(), "rows", leaf)
        KEPT[name](own).square().sum().backward()
        grads.append(made[0].grad)
    assert grads[0] is not None
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 1e-5  # single ones may be sums that cancel
