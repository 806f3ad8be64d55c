"""A weight update as a sum of orthogonal components, best first, and how many of them to keep in every layer.

The components are orthogonal, so the squared error of keeping some is the energy of the others. Whatever the layers,
bytes are spent best where the next component of every layer saves the same energy per byte: the equal slope of
reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from spectral_surgery.adapters.base import AdapterMethod
from spectral_surgery.errors import ConfigError

_RANGES = {"bytes": (1.0, 1e15), "max_error": (1e-4, 1.0), "count": (1.0, 1e12)}


@dataclass(frozen=True)
class Size:
    """How large an adapter may be.

    Attributes:
        kind: ``bytes`` of the file in all, ``max_error``, the relative error of every layer, or ``count``, components
            of every layer: a rank or a number of coefficients.

    Raises:
        ConfigError: when it is out of range.
    """

    kind: Literal["bytes", "max_error", "count"]
    value: float

    def __post_init__(self) -> None:
        low, high = _RANGES[self.kind]
        if not low <= self.value <= high:
            raise ConfigError(f"{self.kind}: expected {low:g} to {high:g}, got {self.value:g}.")


@dataclass(frozen=True)
class Expansion:
    """The first components of a weight update.

    Attributes:
        energy: ‖ΔW‖².
        reach: energy of all components the method has, of which these may be a few.
        gains: [K] float64, the energy of each.
        order: [K] float64, never increasing: by what the layers compare their components. The gains, or their mean
            where the order is not ours to choose.
        parts: tensors with K as the first dimension.
    """

    energy: float
    reach: float
    gains: Tensor
    order: Tensor
    parts: dict[str, Tensor]

    def first(self, count: int) -> Expansion:
        """The first ``count`` components, without the memory of the others."""
        parts = {key: part[:count].clone() for key, part in self.parts.items()}
        return replace(self, gains=self.gains[:count].clone(), order=self.order[:count].clone(), parts=parts)

    @property
    def floor(self) -> float:
        """The least relative error with any number of components."""
        return max(0.0, 1 - self.reach / self.energy) ** 0.5 if self.energy else 0.0


@dataclass(frozen=True)
class Extractor:
    """How weight updates become adapters of one method.

    Attributes:
        unit: what a component is called: rank or n_frequency.
        most: (O, I) -> components there are.
        numbers: (O, I) -> stored floats of a component.
        expand: (ΔW [O, I] float32, the most components, energy that is enough or None, settings) -> expansion.
        tensors: (parts, (O, I), settings) -> state dict of the adapter.
        settle: (settings, components by layer) -> the settings of the whole adapter.
        check: refuses settings that extraction cannot keep.
    """

    method: AdapterMethod[Any]
    unit: str
    most: Callable[[tuple[int, int]], int]
    expand: Callable[[Tensor, int, float | None, Any], Expansion]
    tensors: Callable[[dict[str, Tensor], tuple[int, int], Any], dict[str, Tensor]]
    settle: Callable[[Any, dict[str, int]], Any]
    numbers: Callable[[tuple[int, int]], int] = lambda _: 1
    place_bytes: Callable[[tuple[int, int]], int] = lambda _: 0
    check: Callable[[Any], None] = lambda _: None

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    def cost(self, shape: tuple[int, int], itemsize: int) -> int:
        """Stored bytes of a component of a layer, with floats of ``itemsize`` bytes."""
        return self.numbers(shape) * itemsize + self.place_bytes(shape)


@dataclass
class Allocation:
    """Which components of the layers seen so far are worth their bytes.

    More layers only raise the price, so what is dropped never comes back, and memory stays within twice the budget and
    one layer.

    Attributes:
        budget: bytes; None for no limit.
        layers: the components kept, by layer.
        costs: bytes of a component, by layer.
    """

    budget: int | None
    layers: dict[str, Expansion] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, expansion: Expansion, cost: int) -> None:
        """Let the components of one more layer compete."""
        self.layers[name], self.costs[name] = expansion, cost
        nbytes = sum(self.costs[layer] * len(self.layers[layer].order) for layer in self.layers)
        if self.budget is not None and nbytes > 2 * self.budget:
            self.settle()

    def settle(self) -> None:
        """Drop what the budget does not pay for."""
        if self.budget is not None and self.layers:
            for layer, count in zip(self.layers, self._counts(self.budget), strict=True):
                if count < len(self.layers[layer].order):
                    self.layers[layer] = self.layers[layer].first(count)

    def _counts(self, budget: int) -> list[int]:
        """Components that are worth it, by layer."""
        lengths = torch.tensor([len(expansion.order) for expansion in self.layers.values()])
        owners = torch.repeat_interleave(lengths)
        costs = torch.tensor(list(self.costs.values()), dtype=torch.float64)[owners]
        slopes = torch.cat([expansion.order for expansion in self.layers.values()]) / costs
        best = slopes.argsort(descending=True, stable=True)  # within a layer in its order
        affordable = int((costs[best].cumsum(0) <= budget).sum())
        counts: list[int] = torch.bincount(owners[best[:affordable]], minlength=len(self.layers)).tolist()
        return counts


def energy_of(tensor: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)


def count_for(gains: Tensor, enough: float) -> int:
    """How many components have an energy of at least ``enough`` together; all where they do not.

    ``gains`` is [K] float64, in order.
    """
    return min(int((gains.cumsum(0) < enough).sum()) + 1, len(gains))
