"""Adapters into the weights of a live model, and out again bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import Adapter
from spectral_surgery.adapters.layer import AdaptedLayer, is_conv1d
from spectral_surgery.adapters.saved import SavedModule, TrainedBias
from spectral_surgery.errors import ConfigError, NotMergeableError
from spectral_surgery.live.attach import adapted_layers, set_active
from spectral_surgery.live.undo import Undo, merge_weight, unmerge_weight


def merge(model: nn.Module, weights: Mapping[str, float] | None = None) -> None:
    """Add the updates of adapters to the weights of their layers, in float32 with one cast.

    Tied weights stay tied. All layers are merged, or none.

    Args:
        weights: factor by name of the adapters to merge; None for the active ones.

    Raises:
        ConfigError: when there is nothing to merge, it is merged already, or a weight is quantised.
        NotMergeableError: when an adapter is not one weight update, or a sum is not finite.
    """
    if weights is not None:
        set_active(model, weights)
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.active}
    if not layers:
        raise ConfigError("merge: expected an active adapter, got none. Use set_active.")
    done: dict[str, AdaptedLayer] = {}
    try:
        for name, layer in layers.items():
            layer.merged = _merge_layer(layer, name)
            done[name] = layer
    finally:
        if len(done) < len(layers):
            for name, layer in reversed(done.items()):
                _unmerge_layer(layer, name)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the weights again: the same bits as before, adapters beside them.

    Raises:
        ConfigError: when nothing is merged.
        UnmergeError: when a weight or an adapter was changed since; layers after it are unmerged by then.
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.merged is not None}
    if not layers:
        raise ConfigError("unmerge: expected a model with merged adapters, got none.")
    for name, layer in reversed(layers.items()):  # of two with one weight between them, the last one merged is first
        _unmerge_layer(layer, name)


def merge_and_unload(model: nn.Module, weights: Mapping[str, float] | None = None) -> None:
    """Merge, and leave plain modules with nothing of the adapters beside them."""
    merge(model, weights)
    modules = list(model.named_modules())
    for name, module in reversed(modules):  # what is inside first
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, TrainedBias):
            delattr(model.get_submodule(parent), leaf)  # the bias in use stays
        elif isinstance(module, (AdaptedLayer, SavedModule)):
            plain = module.base_layer if isinstance(module, AdaptedLayer) else module.used
            setattr(model.get_submodule(parent), leaf, plain)


def total_delta(parts: Sequence[tuple[nn.Module, float]], shape: Sequence[int], *, transposed: bool) -> Tensor:
    """The sum of weight * ΔW over adapters, in float64, which makes it the same on every machine but for noise.

    Args:
        parts: (adapter, weight).
        shape: of the stored weight: [O, I], [I, O] if transposed, or [O, I / (kh kw), kh, kw].
        transposed: whether the weight is stored as [I, O].

    Returns:
        Of that shape, float64.
    """
    total: Tensor | None = None
    with torch.no_grad():
        for adapter, weight in parts:
            exact = copy.deepcopy(adapter).double()
            delta = cast(Adapter, exact).delta_weight().double() * weight
            total = delta if total is None else total.add_(delta)
    if total is None:
        raise ConfigError("merge: expected one adapter or more, got none.")
    return (total.T if transposed else total).reshape(list(shape))


def _merge_layer(layer: AdaptedLayer, name: str) -> Undo:
    if layer.merged is not None:
        raise ConfigError(f"{name}: expected adapters beside the weights, got merged ones. Use unmerge first.")
    weight = _weight(layer, name)
    merged, undo = merge_weight(weight.detach(), _delta(layer, weight), name)
    with torch.no_grad():
        weight.copy_(merged)
    return undo


def _unmerge_layer(layer: AdaptedLayer, name: str) -> None:
    weight = _weight(layer, name)
    base = unmerge_weight(weight.detach(), _delta(layer, weight), cast(Undo, layer.merged), name)
    with torch.no_grad():
        weight.copy_(base)
    layer.merged = None


def _weight(layer: AdaptedLayer, name: str) -> nn.Parameter:
    weight: Any = getattr(layer.base_layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        kind = type(layer.base_layer).__name__
        raise NotMergeableError(
            f"{name}: expected a dense Linear, Conv1D, Conv2d or Embedding to merge into, got a {kind}."
            " Decompress the model first."
        )
    return weight


def _delta(layer: AdaptedLayer, weight: Tensor) -> Tensor:
    parts = [(layer.adapters[name], factor) for name, factor in layer.active.items()]
    return total_delta(parts, weight.shape, transposed=is_conv1d(layer.base_layer))
