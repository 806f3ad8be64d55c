"""Which modules of a model carry an adapter, with every choice made that was left open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.layer import AdaptedLayer, kind_of, shape_of
from spectral_surgery.adapters.saved import SavedModule
from spectral_surgery.errors import TargetError
from spectral_surgery.targets import ALL_LINEAR

# ends of names that carry an adapter where nobody chose, the first set that fits; as PEFT's tables by architecture
_DEFAULT_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("mlp.c_proj",),
    ("query_key_value",),
    ("q", "v"),
)
_HEADS = ("lm_head", "score", "classifier", "embed_out")


def resolve(model: nn.Module, spec: AdapterSpec) -> AdapterSpec:
    """Make the choices a specification leaves open: targets by architecture, "auto" settings by shapes.

    Args:
        model: the base model.
        spec: as asked.

    Returns:
        A specification that another program reads the same way.

    Raises:
        TargetError: when no module matches.
    """
    modules = dict(candidates(model))
    targets = spec.targets
    if targets.target_modules is None:
        fitting = (ends for ends in _DEFAULT_TARGETS if _all_match(ends, modules))
        usual = next(fitting, None)
        if usual is None:
            some = ", ".join(list(modules)[:3])
            raise TargetError(
                f"target_modules: not given, and no usual names are among {some}, ...; ends of names, a regular"
                " expression or all-linear are accepted. Use --target-modules."
            )
        targets = replace(targets, target_modules=usual)
    if targets.target_modules == ALL_LINEAR:
        heads = _head_names(model)
        linear = [name for name, module in modules.items() if kind_of(module) == "linear" and name not in heads]
        targets = replace(targets, target_modules=tuple(targets.select(linear)))
    everything = dict(candidates(model, everything=True))
    chosen = [everything[name] for name in targets.select(everything)]
    shapes = [shape_of(module) for module in chosen]
    transposed = all(type(module).__name__ == "Conv1D" for module in chosen)
    targets = replace(targets, fan_in_fan_out=transposed)
    return replace(spec, targets=targets, config=spec.method.resolve(spec.config, shapes))


def candidates(model: nn.Module, *, everything: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Modules that can carry an adapter, by name; those that carry one appear as their base.

    Args:
        model: any model.
        everything: convolutions and embeddings too, not only linear layers.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, (AdaptedLayer, SavedModule)):
            inside.append(name)
        base = module.base_layer if isinstance(module, AdaptedLayer) else module
        kind = kind_of(base)
        if name and kind is not None and (everything or kind == "linear"):
            yield name, base


def _all_match(ends: Iterable[str], names: Iterable[str]) -> bool:
    names = list(names)
    return all(any(f".{name}".endswith(f".{end}") for name in names) for end in ends)


def _head_names(model: nn.Module) -> set[str]:
    """Names of output layers, which all-linear leaves out."""
    ask = getattr(model, "get_output_embeddings", None)
    output = ask() if callable(ask) else None
    return {name for name, module in model.named_modules() if module is output or name.split(".")[-1] in _HEADS}
