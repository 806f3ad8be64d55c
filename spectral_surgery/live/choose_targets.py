"""Which modules of a model carry an adapter, with every choice made that was left open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.layer import AdaptedLayer, is_conv1d, kind_of, regroups, shape_of
from spectral_surgery.adapters.saved import SavedModule
from spectral_surgery.errors import ConfigError, TargetError
from spectral_surgery.live.heads import head_names
from spectral_surgery.targets import ALL_LINEAR, ModuleTargets

# ends of names that carry an adapter where nobody chose, the first set that fits; as PEFT's tables by architecture
_DEFAULT_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("mlp.c_proj",),
    ("query_key_value",),
    ("q", "v"),
    ("query_proj", "value_proj"),
    ("Wqkv",),
    ("qkv_proj",),
    ("in_proj",),
    ("key", "value", "receptance", "output"),
)
_TINY = 0.01  # part of the weights of all linear layers that may be in layers too small for the settings
_REGROUPS = "its outputs have another shape than those of a linear layer, so that no update can be added"
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


def resolve(model: nn.Module, spec: AdapterSpec) -> AdapterSpec:
    """Make the choices a specification leaves open: targets by architecture, "auto" settings by shapes.

    Raises:
        TargetError: when no module matches, or one that can carry no adapter does.
    """
    modules = dict(candidates(model))
    targets = _with_all_saved(model, spec.targets)
    if targets.target_modules is None:
        fitting = (ends for ends in _DEFAULT_TARGETS if _all_match(ends, modules))
        usual = next(fitting, None)
        if usual is None:
            examples = ", ".join(list(modules)[:3])
            raise TargetError(
                f"target_modules: expected ends of names, a regular expression or all-linear, as no usual names are"
                f" among {examples}, .... Use --target-modules."
            )
        targets = replace(targets, target_modules=usual)
    if targets.target_modules == ALL_LINEAR:
        linear, _ = all_linear(model, replace(spec, targets=targets))
        targets = replace(targets, target_modules=tuple(linear))
    refused = [name for name, module in _outer(model) if regroups(module) and targets.matches(name)]
    if refused:
        raise TargetError(
            f"target_modules: expected layers that an update can be added to, got {refused[0]} and {len(refused) - 1}"
            f" more: {_REGROUPS}. Use --exclude-modules."
        )
    everything = dict(candidates(model, everything=True))
    names = targets.select(everything)
    chosen = [everything[name] for name in names]
    shapes = [shape_of(module) for module in chosen]
    transposed = all(is_conv1d(module) for module in chosen)
    targets = replace(_read_alike(model, targets, names), fan_in_fan_out=transposed)
    return replace(spec, targets=targets, config=spec.method.resolve(spec.config, shapes))


def all_linear(model: nn.Module, spec: AdapterSpec) -> tuple[list[str], dict[str, str]]:
    """What all-linear means.

    Returns:
        (names of the layers, reason by name of every layer and expert that is left out).

    Raises:
        TargetError: when there is no linear layer.
    """
    modules = {name: module for name, module in candidates(model) if _is_plain(module)}
    heads = head_names(model)
    left_out = dict.fromkeys(_fused_experts(model), "experts in one tensor, and no linear layer")
    left_out |= {name: "a head" for name in modules if name in heads}
    left_out |= {name: _REGROUPS for name, module in _outer(model) if regroups(module)}
    left_out |= {
        name: "a router, which gives more than its product" for name, module in _outer(model) if _is_router(module)
    }
    usable = [name for name in modules if name not in left_out]
    if not usable:
        raise TargetError(
            f"target_modules all-linear: expected a linear layer beside {len(left_out)} heads and experts, got none."
            " Name other modules with --target-modules."
        )
    wanted = spec.targets.select(usable)
    shapes = {name: shape_of(modules[name]) for name in wanted}
    misfits = _misfits(replace(spec, config=spec.method.resolve(spec.config, list(shapes.values()))), shapes)
    total = sum(rows * columns for rows, columns in shapes.values())
    if sum(shapes[name][0] * shapes[name][1] for name in misfits) > _TINY * total:
        misfits = {}  # no exceptions: the settings are wrong, which is refused when adapters are built
    left_out |= {name: f"too small: {error}" for name, error in misfits.items()}
    return [name for name in wanted if name not in misfits], left_out


def candidates(model: nn.Module, *, everything: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Modules that can carry an adapter, by name; those that carry one appear as their base."""
    for name, module in _outer(model):
        base = module.base_layer if isinstance(module, AdaptedLayer) else module
        kind = kind_of(base)
        if kind is not None and (everything or kind == "linear"):
            yield name, base


def _outer(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model itself, not what is inside those that carry adapters."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, (AdaptedLayer, SavedModule)):
            inside.append(name)
        yield name, module


def _all_match(ends: Iterable[str], names: Iterable[str]) -> bool:
    names = list(names)
    return all(any(f".{name}".endswith(f".{end}") for name in names) for end in ends)


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer multiplies by its weight as it is: others with a dense weight change it."""
    dense = isinstance(module._parameters.get("weight"), nn.Parameter)
    return not dense or isinstance(module, nn.Linear) or is_conv1d(module)


def _is_router(module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear) or kind_of(module) == "linear"
    return linear and type(module) is not nn.Linear and "router" in type(module).__name__.lower()


def _fused_experts(model: nn.Module) -> Iterator[str]:
    for name, module in _outer(model):
        if _EXPERTS.search(name) or "expert" in type(module).__name__.lower():
            parameters = module.named_parameters(recurse=False)
            yield from (f"{name}.{leaf}" for leaf, weight in parameters if weight.ndim >= 2 and kind_of(module) is None)


def _misfits(spec: AdapterSpec, shapes: Mapping[str, tuple[int, int]]) -> dict[str, ConfigError]:
    """The layers that the settings do not fit, with the reason."""
    misfits = {}
    for name, shape in shapes.items():
        try:
            with torch.device("meta"):
                spec.build(name, *shape)
        except ConfigError as error:
            misfits[name] = error
    return misfits


def _with_all_saved(model: nn.Module, targets: ModuleTargets) -> ModuleTargets:
    """The targets, with all that PEFT trains whole for the same modules_to_save: names that end so, dot or not."""
    asked = targets.modules_to_save
    more = [name for name, _ in _outer(model) if name.endswith(asked) and not targets.saves(name)] if asked else []
    return replace(targets, modules_to_save=(*asked, *more))


def _read_alike(model: nn.Module, targets: ModuleTargets, chosen: list[str]) -> ModuleTargets:
    """The targets in words by which PEFT, which looks at modules of every kind, finds those chosen and no others."""
    names = [name for name, _ in _outer(model)]
    exact = replace(targets, target_modules=tuple(chosen), layers_to_transform=None, layers_pattern=())
    whole = replace(exact, target_modules="|".join(map(re.escape, chosen)))
    alike = (
        candidate
        for candidate in (targets, exact)
        if {name for name in names if candidate.matches(name)} == set(chosen)
    )
    return next(alike, whole)
