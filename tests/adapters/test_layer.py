"""Which layers an update of [..., O] can be added to: subclasses of nn.Linear that give something else take none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.adapters.layer import AdaptedLayer, kind_of, regroups
from spectral_surgery.errors import ConfigError


class Grouped(nn.Linear):
    """Multiplies each of some groups of inputs, [..., G, I], by a part of the weight."""

    def __init__(self, columns: int, rows: int, groups: int) -> None:
        super().__init__(columns, rows, bias=False)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.groups, -1, x.shape[-1])
        y = torch.einsum("tgi,goi->tgo", x.reshape(-1, self.groups, x.shape[-1]), weight)
        return y.reshape(*x.shape[:-1], -1)


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).chunk(2, -1)[0]


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x).topk(2)


class Turned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.register_buffer("scale", torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Asks(nn.Linear):
    """Cannot run without numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().max()) > 0 else x


class Renamed(nn.Linear):
    pass


@pytest.mark.parametrize("layer", [Grouped(6, 8, 2), Grouped(6, 8, 8), Halved(6, 8), Router(6, 8)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_with_other_outputs_take_no_adapter(layer: nn.Linear, device: str) -> None:
    layer = layer.to(device)
    before = dict(layer.named_parameters())
    assert regroups(layer)
    assert kind_of(layer) is None
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
    with pytest.raises(
        ConfigError, match=f"in_features to out_features, got {type(layer).__name__}, which cannot carry"
    ):
        AdaptedLayer(layer)


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), Turned(6, 8), Scaled(6, 8), Asks(6, 8), Renamed(6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_give_what_linear_ones_do_take_one(layer: nn.Linear, dtype: torch.dtype) -> None:
    assert kind_of(layer.to(dtype)) == "linear"


def test_a_quantised_layer_is_not_run() -> None:
    layer = Halved(6, 8)
    layer.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    assert kind_of(layer) == "linear"
