"""One row of x without gradients: a kernel adds its residual to the product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from spectral_surgery import fourier as op
from spectral_surgery.fourier import adapted_linear, fold, one_row, reference

SCALING = 7.0


def places(rows: int, columns: int, count: int = 30) -> Tensor:
    return torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))[:count]


def draw(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 9), (1, 16), (16, 1), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_definition(dtype: torch.dtype, shape: tuple[int, int], bias: bool) -> None:
    rows, columns = shape
    positions, count = places(rows, columns), min(30, rows * columns)
    x, weight, c = draw(columns).to(dtype), draw(rows, columns, seed=1).to(dtype), draw(count, seed=2).float()
    own = draw(rows, seed=3).to(dtype) if bias else None
    delta = reference.delta_weight(c.double(), positions, shape, SCALING)
    expected = linear(x.double(), weight.double() + delta, None if own is None else own.double())
    limit = 8 * torch.finfo(dtype).eps * max(float(expected.norm()), float(weight.norm() * x.norm()))
    with torch.no_grad():
        for lead in ((), (1,), (1, 1)):
            y = adapted_linear(x.view(*lead, columns), weight, own, c, fold(positions, *shape), SCALING)
            assert y.shape == (*lead, rows)
            assert y.dtype == dtype
            assert float((y.reshape(-1) - expected).norm()) < limit


def test_a_row_takes_its_own_way_only_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def add_row(*arguments: Any) -> bool:
        calls.append(one_row.add_row(*arguments))
        return calls[-1]

    monkeypatch.setattr(op, "add_row", add_row)
    weight, c, folded = draw(12, 20).float(), draw(30).float(), fold(places(12, 20), 12, 20)
    x = draw(1, 1, 20).float()
    adapted_linear(x, weight, None, c, folded, SCALING)
    assert not calls
    with torch.no_grad():
        y = adapted_linear(x, weight, None, c, folded, SCALING)
        assert calls == [True]
        mapped = torch.vmap(adapted_linear, (None, None, None, 0, None, None))(
            x, weight, None, torch.stack((c, c)), folded, SCALING
        )
        torch.testing.assert_close(mapped[1], y)
        twice = torch.vmap(adapted_linear, (0, None, None, None, None, None))(
            torch.stack((x, x)), weight, None, c, folded, SCALING
        )
        torch.testing.assert_close(twice[1], y)
        weights = torch.vmap(adapted_linear, (None, 0, None, None, None, None))(
            x, torch.stack((weight, weight)), None, c, folded, SCALING
        )
        torch.testing.assert_close(weights[1], y)
        assert calls == [True, False, False, False]  # what is mapped has no memory of its own
    routes = len(one_row._ROUTES)
    del folded
    assert len(one_row._ROUTES) == routes - 1
