"""Weight updates into adapters: the methods that can, and the fit of many layers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapters.from_update.expand_low_rank import LOW_RANK
from spectral_surgery.adapters.from_update.expand_spectrum import SPECTRAL
from spectral_surgery.adapters.from_update.expansion import Allocation, Expansion, Extractor, Size, energy_of
from spectral_surgery.errors import ConfigError
from spectral_surgery.registry import Table

__all__ = ["EXTRACTORS", "Extractor", "Fit", "Size", "Update", "fit"]

EXTRACTORS: Table[Extractor] = Table("method to extract to", (*SPECTRAL, *LOW_RANK))


@dataclass(frozen=True)
class Update:
    """The weight update of one layer. ``delta``: reads or computes ΔW, [O, I] float32; it may be called twice."""

    layer: str
    shape: tuple[int, int]
    delta: Callable[[], Tensor]


@dataclass(frozen=True)
class Fit:
    """Adapters for many layers.

    Attributes:
        config: settings of the method, patterns by layer included.
        layers: state dict of the adapter by layer, of those with one.
        counts: components by layer of all that differ; 0 without an adapter.
        floors: by layer, the least relative error that the method can reach.
        unchanged: layers without a difference.
    """

    config: Any
    layers: dict[str, dict[str, Tensor]]
    counts: dict[str, int]
    floors: dict[str, float]
    unchanged: tuple[str, ...]


def fit(
    extractor: Extractor,
    config: Any,
    updates: Sequence[Update],
    size: Size,
    *,
    dtype: torch.dtype = torch.float32,
    max_count: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Fit:
    """Approximate weight updates by adapters of one method, one layer in memory at a time.

    Returns the adapters; of a budget, spent by equal slope over all layers.

    Args:
        size: bytes of all adapters together, relative error of each, or components of each.
        dtype: of the stored floats.
        max_count: no layer has more components, whatever the size.

    Raises:
        ConfigError: when the settings cannot be kept, ΔW is not finite, nothing differs, the error is out of the
            method's reach, or the budget is too small for a single component.
    """
    extractor.check(config)
    limit = _limit(size, dtype)
    allocation = Allocation(int(size.value) if size.kind == "bytes" else None)
    unchanged, shapes, floors = [], {}, {}
    for update in updates:
        delta = update.delta()
        if not bool(delta.isfinite().all()):
            raise ConfigError(f"{update.layer}: expected finite weights, got a difference that is not finite.")
        if not bool(delta.any()):
            unchanged.append(update.layer)
        else:
            cost = extractor.cost(update.shape, dtype.itemsize)
            most = min(extractor.most(update.shape), max_count or extractor.most(update.shape))
            if allocation.budget is not None:
                most = min(most, max(1, allocation.budget // cost))  # one that is too dear is dropped below
            expansion = _expanded(extractor, config, delta, (size.kind, limit), most)
            shapes[update.layer], floors[update.layer] = update.shape, expansion.floor
            if size.kind == "max_error" and limit < expansion.floor:
                raise ConfigError(_out_of_reach(extractor, update.layer, size.value, expansion.floor))
            allocation.add(update.layer, expansion, cost)
        report(update.layer)
    allocation.settle()
    counts = {layer: len(expansion.gains) for layer, expansion in allocation.layers.items()}
    kept = {layer: count for layer, count in counts.items() if count}
    _check_something(counts, size, allocation.costs)
    settled = extractor.settle(config, kept)
    layers = {
        layer: _stored(extractor.tensors(allocation.layers[layer].parts, shapes[layer], settled), dtype)
        for layer in kept
    }
    return Fit(settled, layers, counts, floors, tuple(unchanged))


def _check_something(counts: dict[str, int], size: Size, costs: dict[str, int]) -> None:
    if not counts:
        raise ConfigError(
            "difference: expected models that differ, or an adapter that was trained, got zero in every layer."
        )
    if not any(counts.values()):
        least = min(costs.values())
        raise ConfigError(f"bytes: expected {least} or more, got {size.value:g}: too few for a single component.")


def _stored(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def _limit(size: Size, dtype: torch.dtype) -> float:
    """The error that components left out may make, so that rounding what is stored does not exceed what was asked for.

    Raises ConfigError when rounding alone may exceed it.
    """
    rounding = torch.finfo(dtype).eps  # of a product of two rounded factors, at most
    if size.kind != "max_error":
        return size.value
    if size.value <= rounding:
        raise ConfigError(
            f"max_error: expected more than {rounding:.2g}, which numbers of {dtype} may lose when they are rounded,"
            f" got {size.value:g}. Use another dtype."
        )
    return math.sqrt(size.value**2 - rounding**2)


def _expanded(extractor: Extractor, config: Any, delta: Tensor, wanted: tuple[str, float], most: int) -> Expansion:
    kind, value = wanted
    if kind != "max_error":
        return extractor.expand(delta, min(most, int(value)) if kind == "count" else most, None, config)
    return extractor.expand(delta, most, energy_of(delta) * (1 - value**2), config)


def _out_of_reach(extractor: Extractor, layer: str, wanted: float, floor: float) -> str:
    return (
        f"max_error {wanted:g}: out of reach of {extractor.name} for {layer}, where {floor:.3f} is the least; real"
        " Fourier coefficients span half of all matrices. Use spectral_delta, foura or lora."
    )
