"""inject: a fresh adapter for a checkpoint, from the names and shapes in its headers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.layer import forms_of, shape_of
from spectral_surgery.checkpoint.adapter_files import write_adapter
from spectral_surgery.checkpoint.companions import check_apart
from spectral_surgery.checkpoint.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.checkpoint.publish import publishing
from spectral_surgery.checkpoint.reader import read_tensor
from spectral_surgery.checkpoint.task import task_of
from spectral_surgery.errors import CheckpointError, TargetError
from spectral_surgery.surgery.resolve import candidates, resolve
from spectral_surgery.surgery.skeleton import skeleton
from spectral_surgery.workflows.progress import Progress, silent


@dataclass(frozen=True)
class InjectPlan:
    """A fresh adapter, decided.

    Attributes:
        index: the base.
        spec: every choice made.
        layers: (O, I) by module that gets one.
        parameters: trained numbers by module.
        stored_bytes: of the tensors, with places and copies.
        copied: tensors of the base that are trained whole, by the name they have in an adapter's files.
        forms: which layers are embeddings or convolutions, as `AdapterState` has it.
    """

    index: CheckpointIndex
    spec: AdapterSpec
    layers: dict[str, tuple[int, int]]
    parameters: dict[str, int]
    stored_bytes: int
    copied: dict[str, TensorInfo]
    forms: tuple[frozenset[str], dict[str, tuple[int, ...]]]

    @property
    def trained(self) -> int:
        """Parameters that training changes."""
        return sum(self.parameters.values()) + sum(info.numel for info in self.copied.values())

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "method": self.spec.method.name,
            "layers": [
                {"layer": name, "shape": list(shape), "parameters": self.parameters[name]}
                for name, shape in self.layers.items()
            ],
            "copied": {name: list(info.shape) for name, info in self.copied.items()},
            "trained_parameters": self.trained,
            "parameters": sum(info.numel for info in self.index.tensors.values()),
            "stored_bytes": self.stored_bytes,
        }


def plan_injection(source: Path, spec: AdapterSpec) -> InjectPlan:
    """Choose the layers and settle the settings; only headers are read.

    Args:
        source: a checkpoint, or the outline of one.
        spec: as asked: targets and settings may be left open.

    Raises:
        CheckpointError: when the checkpoint is damaged, quantised or compressed.
        TargetError: when the targets match nothing.
        ConfigError: when a setting does not fit a layer.
    """
    index = read_index(source)
    if "quantization_config" in index.config:
        raise CheckpointError(
            f"{source}: is quantised or compressed, and its headers do not tell the shapes of its layers; a plain"
            " checkpoint is accepted. Decompress it first."
        )
    kind = index.config.get("model_type")
    shapes = {name: info.shape for name, info in index.tensors.items()}
    model = skeleton(shapes, kind if isinstance(kind, str) else None)
    spec = replace(resolve(model, spec), task_type=spec.task_type or task_of(index.config))
    modules = dict(candidates(model, everything=True))
    layers = {name: shape_of(modules[name]) for name in spec.targets.select(modules)}
    copied = _copied(index, spec, layers)
    parameters, stored = {}, sum(info.nbytes for info in copied.values())
    for name, shape in layers.items():
        adapter = _on_meta(spec, name, shape)
        parameters[name] = sum(parameter.numel() for parameter in adapter.parameters())
        stored += sum(tensor.nbytes for tensor in adapter.state_dict().values())
    return InjectPlan(
        index, spec, layers, parameters, stored, copied, forms_of({name: modules[name] for name in layers})
    )


def inject(
    source: Path, out: Path, spec: AdapterSpec, *, seed: int = 0, overwrite: bool = False, progress: Progress = silent
) -> InjectPlan:
    """Write a fresh, untrained adapter in PEFT's format.

    Args:
        source: a checkpoint, of which only headers and what is trained whole are read.
        out: folder to create.
        spec: as asked: targets and settings may be left open.
        seed: of the random starts.
        overwrite: replace an existing folder.
        progress: called after each layer.

    Returns:
        What was written.

    Raises:
        CheckpointError: as `plan_injection`, and when out is taken.
        TargetError: as `plan_injection`.
        ConfigError: as `plan_injection`.
    """
    check_apart(source, out)
    plan = plan_injection(source, spec)
    layers: dict[str, dict[str, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, shape in plan.layers.items():
            layers[name] = {key: value.detach() for key, value in plan.spec.build(name, *shape).state_dict().items()}
            progress(len(layers), len(plan.layers), name)
    extra = {name: read_tensor(info) for name, info in plan.copied.items()}
    with publishing(out, overwrite=overwrite) as folder:
        write_adapter(AdapterState(plan.spec, layers, extra, *plan.forms), folder)
    return plan


def _on_meta(spec: AdapterSpec, name: str, shape: tuple[int, int]) -> nn.Module:
    with torch.device("meta"):
        return spec.build(name, *shape)


def _copied(index: CheckpointIndex, spec: AdapterSpec, layers: dict[str, tuple[int, int]]) -> dict[str, TensorInfo]:
    """What is trained whole: modules_to_save and biases, as `surgery.attach.state_of` names them."""
    targets = spec.targets
    copied = {name: info for name, info in index.tensors.items() if targets.saves(name)}
    for own in targets.modules_to_save:
        if not any(replace(targets, modules_to_save=(own,)).saves(name) for name in copied):
            raise TargetError(f"modules_to_save {own}: not in {index.root}; names or ends of names are accepted.")
    for name, info in index.tensors.items():
        module, _, leaf = name.rpartition(".")
        asked = module in layers if targets.bias.endswith("_only") else targets.bias == "all"
        if leaf == "bias" and asked and name not in copied:
            copied[f"{module}.base_layer.bias" if module in layers else name] = info
    return copied
