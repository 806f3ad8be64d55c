"""Tensors that differ and carry no adapter: those that an adapter's files can hold whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from spectral_surgery.files.header import FLOATS
from spectral_surgery.hf.base_model import BaseModel
from spectral_surgery.hf.tensor_names import StoredParameter
from spectral_surgery.targets import ModuleTargets


@dataclass(frozen=True)
class Rest:
    """What is stored whole beside the adapters.

    Attributes:
        targets: with modules_to_save and bias set for it.
        tensors: by the name they have in an adapter's files.
        missing: reason by name of tensors that cannot be stored.
    """

    targets: ModuleTargets
    tensors: dict[str, StoredParameter] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def save_rest(
    model: BaseModel, rest: dict[str, str], layers: Collection[str], targets: ModuleTargets, method: str
) -> Rest:
    """Choose how to store tensors whole: biases of adapted layers as trained biases, others with their modules.

    A module that is tied to another one is stored for both: PEFT makes two of them, and leaves the other as it was.

    ``rest``: reason by name of what differs; one with another shape than the base cannot replace it.
    """
    tuned = model.stored
    missing = {name: reason for name, reason in rest.items() if ", in BASE" in reason}
    biases = [name for name in rest if name not in missing and name.endswith(".bias") and name[:-5] in layers]
    modules: list[str] = []
    for name in rest:
        module = name.rpartition(".")[0]
        if name in missing or name in biases or module in modules:
            continue
        problem = _problem(tuned, module, layers)
        if problem:
            missing[name] = problem
        else:
            modules.append(module)
    tensors = {}
    if biases:
        targets = replace(targets, bias=f"{method}_only")
        every = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in tuned]
        tensors = {f"{name.removesuffix('.bias')}.base_layer.bias": tuned[name] for name in every}
    tied = {alias for module in modules for name in _tensors_of(tuned, module) for alias in model.tied_with(name)}
    modules += sorted({name.rpartition(".")[0] for name in tied} - {*modules})
    targets = replace(targets, modules_to_save=tuple(modules))
    for name in (*model.ties, *model.ties.values()):
        parameter = model.names.find(name)
        if targets.saves(name) and parameter is not None:
            tensors[name] = parameter
    tensors |= {name: parameter for name, parameter in tuned.items() if targets.saves(name)}
    return Rest(targets, tensors, missing)


def _tensors_of(tuned: Mapping[str, StoredParameter], module: str) -> list[str]:
    return [name for name in tuned if name.rpartition(".")[0] == module]


def _problem(tuned: Mapping[str, StoredParameter], module: str, layers: Collection[str]) -> str:
    """Why the module of a tensor cannot be stored whole; empty when it can."""
    if not module:
        return "belongs to no module"
    saved = [other for other in tuned if ModuleTargets(modules_to_save=(module,)).saves(other)]
    inside = [other for other in saved if other.startswith(f"{module}.") and "." in other[len(module) + 1 :]]
    if inside:
        return f"its module {module} has others inside"
    if any(other.rpartition(".")[0] in layers for other in saved):
        return f"the name {module} also means a layer with an adapter"
    strange = [other for other in saved if tuned[other].dtype not in FLOATS]
    return f"{strange[0]} is {tuned[strange[0]].dtype}" if strange else ""
