"""Which parameter an update of PEFT's target_parameters belongs to: its files name the module, and how deep it lay.

PEFT wraps a module once for each of its parameters, in the order in which the module has them, so that the first one is
the innermost; a file says ``experts.base_layer.lora_A`` and ``experts.lora_A``. The factors of stacked experts are one
matrix each: A [E R, I], B [O, R E].
Source: PEFT 0.21.2, `ParamWrapper` of `tuners/lora/layer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.hf.base_model import BaseModel

_WRAPPER = ".base_layer"


def name_parameters(state: AdapterState, base: BaseModel) -> tuple[AdapterState, list[str]]:
    """Give the updates of parameters the names of these, and say what does not fit.

    Returns the adapter with layers named as parameters, whose rank and lora_alpha are those of all experts together.
    """
    if not state.parameters:
        return state, []
    layers, wrong = {}, []
    chosen: dict[str, str] = {}
    modules: dict[str, list[str]] = {}
    for layer in state.parameters:
        module = layer
        while module.endswith(_WRAPPER):
            module = module.removesuffix(_WRAPPER)
        modules.setdefault(module, []).append(layer)
    for module, nested in modules.items():
        nested.sort(key=lambda layer: -len(layer))  # the innermost first
        names = _assigned(state, base, module, nested)
        if names is None:
            wanted = ", ".join(dict.fromkeys(name for layer in nested for name in state.parameters[layer]))
            wrong.append(f"{wanted}: no such parameters of the base have the shapes of the {len(nested)} updates")
        chosen.update(zip(nested, names or (), strict=False))
    for layer, tensors in state.layers.items():
        layers[chosen.get(layer, layer)] = tensors
    config = state.spec.config
    ranks, alphas = {}, {}
    for name in layers:
        settings, experts = config.for_layer(name), _experts(base, name) if name in chosen.values() else 1
        ranks[re.escape(name)], alphas[re.escape(name)] = settings.r * experts, settings.lora_alpha * experts
    config = replace(config, rank_pattern=ranks, alpha_pattern=alphas)
    spec, parameters = replace(state.spec, config=config), {name: (name,) for name in chosen.values()}
    return replace(state, spec=spec, layers=layers, parameters=parameters), wrong


def is_transposed(state: AdapterState, name: str, base: BaseModel) -> bool:
    """Whether stacked experts are [E, I, O]: the module says it, else the factors do."""
    parameter = base.find(name)
    module = base.module(name.rpartition(".")[0])
    if parameter is None or len(parameter.shape) != 3:
        return False
    factors = state.layers[name]
    product = (factors["B"].shape[0], factors["A"].shape[1])
    if product[0] != product[1]:
        return tuple(parameter.shape[1:]) != product
    return bool(getattr(module, "is_transposed", False))


def _experts(base: BaseModel, name: str) -> int:
    parameter = base.find(name)
    return parameter.shape[0] if parameter and len(parameter.shape) == 3 else 1


def _assigned(state: AdapterState, base: BaseModel, module: str, nested: Sequence[str]) -> tuple[str, ...] | None:
    """A parameter for each layer; None where there is none that fits, or more than one way."""
    there = [name for name in state.parameters[nested[0]] if base.find(name) is not None]
    layer = base.module(module)
    order = [f"{module}.{name}" for name in layer._parameters] if layer is not None else []
    if {*there} <= {*order}:
        there.sort(key=order.index)
        if len(there) == len(nested) and _fit(state, base, nested, there):
            return tuple(there)
    ways = [names for names in permutations(there, len(nested)) if _fit(state, base, nested, names)]
    return ways[0] if len(ways) == 1 else None


def _fit(state: AdapterState, base: BaseModel, layers: Sequence[str], names: Sequence[str]) -> bool:
    return all(_fits(state, base, layer, name) for layer, name in zip(layers, names, strict=True))


def _fits(state: AdapterState, base: BaseModel, layer: str, name: str) -> bool:
    parameter, factors = base.find(name), state.layers[layer]
    if parameter is None or not {"A", "B"} <= factors.keys() or len(parameter.shape) not in (2, 3):
        return False
    (rank, inside), (outside, other) = factors["A"].shape, factors["B"].shape
    sides = {(outside, inside)} if len(parameter.shape) == 2 else {(outside, inside), (inside, outside)}
    experts = _experts(base, name)
    return rank == other == experts * state.spec.config.for_layer(name).r and parameter.shape[-2:] in sides
