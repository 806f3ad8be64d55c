"""Curvature measured by random projections is that of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.calibration.curvature import importance_of
from spectral_surgery.codec.encoded import Basis


@pytest.mark.parametrize("basis", [Basis("identity", 8, (0, 1)), Basis("dct", 8, (0, 1))], ids=["identity", "dct"])
def test_of_a_linear_layer_it_is_that_of_its_inputs(basis: Basis) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator) @ torch.diag(torch.linspace(0.2, 3, 16))
    layer, unused = nn.Linear(16, 24, bias=False), nn.Linear(16, 24)

    def project(noise: Tensor) -> Tensor:
        return (layer(x) * noise).sum()

    def projections() -> Iterator[Callable[[], Tensor]]:
        for _ in range(400):
            yield partial(project, torch.randn(64, 24, generator=generator))

    found = importance_of({"own": (layer.weight, basis), "unused": (unused.weight, basis)}, projections())
    assert found.keys() == {"own"}
    along = Basis(basis.transform, 8, (1,))
    inputs = along.forward(along.forward(x.T @ x).T).diagonal()
    curvature = found["own"].rows[:, None] * found["own"].columns
    torch.testing.assert_close(curvature, inputs.expand(24, 16), rtol=0.2, atol=0.02 * float(inputs.mean()))
