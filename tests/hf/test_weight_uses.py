"""What a forward does with a weight is read from its source; in doubt it counts as more than a product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_surgery.hf.quantizer.weight_uses import only_multiplies


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(8.0).to(self.weight.dtype)


class ScaledAgain(Scaled):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Slices(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return self.weight[: input.shape[-1]]


class Product(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class ByMethod(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input).relu()

    def multiply(self, x: Tensor) -> Tensor:
        first, second = self.weight.chunk(2)
        return torch.cat([functional.linear(x, first), functional.linear(x, second)], -1)


class OfItself(nn.Linear):
    """As names are that are assigned where a condition holds: from themselves, and from each other."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if input.ndim > 2:
            weight = weight.transpose(0, 1)
        other = weight.T
        weight = other.T
        return functional.linear(input, weight)


class Untouched(nn.Linear):
    """The forward of nn.Linear."""


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.empty(4, 8, 8))
        self.table = nn.Parameter(torch.empty(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.matrices is None:
            return x
        return functional.linear(x, self.matrices[0]) + self.table


class Normalised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight / self.weight.norm())


class Passed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return custom(input, self.weight)


class Renamed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        return functional.linear(input, weight) + weight.mean()


class OfItselfWrong(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if input.ndim > 2:
            weight = weight.transpose(0, 1)
        other = weight.T
        weight = other.T
        return functional.linear(input, weight) + other.sum()


class Unused(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input


class ByMethodWrong(ByMethod):
    def multiply(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.abs())


class Writes(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        self.weight = nn.Parameter(torch.zeros(2, 2))
        return super().forward(input)


def custom(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


@pytest.mark.parametrize("own", [Scaled, ScaledAgain, Slices, Product, ByMethod, OfItself, Untouched])
def test_products_and_look_ups(own: type[nn.Module]) -> None:
    assert only_multiplies(own, "weight")


@pytest.mark.parametrize("own", [Normalised, Passed, Renamed, OfItselfWrong, Unused, ByMethodWrong, Writes, nn.Conv2d])
def test_more_than_that(own: type[nn.Module]) -> None:
    assert not only_multiplies(own, "weight")


def test_other_parameters_than_weights() -> None:
    assert only_multiplies(Stacked, "matrices")
    assert not only_multiplies(Stacked, "table")
    assert not only_multiplies(Stacked, "nothing")


def test_what_has_no_source_counts_as_more() -> None:
    text = "def forward(self, x):\n    return nn.functional.linear(x, self.weight)\n"
    space = {"nn": nn}
    exec(text, space)  # a function without a file
    assert not only_multiplies(type("Made", (nn.Linear,), {"forward": space["forward"]}), "weight")
