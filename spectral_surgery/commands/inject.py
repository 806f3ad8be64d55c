"""inject: a fresh adapter for a checkpoint, from its configuration and the headers of its files."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spectral_surgery.adapters.base import AdapterSpec, AdapterState
from spectral_surgery.adapters.layer import forms_of, shape_of
from spectral_surgery.errors import BackendError, CheckpointError, TargetError
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.header import named
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.peft.adapter_files import write_adapter
from spectral_surgery.files.peft.task import callable_task, task_of
from spectral_surgery.files.sidecar_files import check_apart
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.hf.models import outline_model
from spectral_surgery.hf.peft.target_rules import misread_by_peft
from spectral_surgery.hf.tensor_names import StoredParameter, TensorNames, names_in
from spectral_surgery.live.choose_targets import all_linear, candidates, resolve
from spectral_surgery.live.heads import trained_heads
from spectral_surgery.live.skeleton import skeleton
from spectral_surgery.progress import Progress, silent
from spectral_surgery.targets import ALL_LINEAR


@dataclass(frozen=True)
class InjectPlan:
    """A fresh adapter, decided.

    Attributes:
        spec: every choice made.
        layers: (O, I) by module that gets one.
        parameters: trained numbers by module.
        stored_bytes: of the tensors, with places and copies.
        copied: parameters of the base that are trained whole, by the name they have in an adapter's files.
        left_out: reason by name of what all-linear might mean, and does not.
        notes: what else needs to be known, in sentences.
        forms: which layers are embeddings or convolutions, as `AdapterState` has it.
    """

    index: CheckpointIndex
    spec: AdapterSpec
    layers: dict[str, tuple[int, int]]
    parameters: dict[str, int]
    stored_bytes: int
    copied: dict[str, StoredParameter]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    forms: tuple[frozenset[str], dict[str, tuple[int, ...]]]

    @property
    def trained(self) -> int:
        """Parameters that training changes."""
        return sum(self.parameters.values()) + sum(info.numel for info in self.copied.values())

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "method": self.spec.method.name,
            "task_type": self.spec.task_type,
            "layers": [
                {"layer": name, "shape": list(shape), "parameters": self.parameters[name]}
                for name, shape in self.layers.items()
            ],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out.items()],
            "copied": {name: list(info.shape) for name, info in self.copied.items()},
            "trained_parameters": self.trained,
            "parameters": sum(info.numel for info in self.index.tensors.values()),
            "stored_bytes": self.stored_bytes,
            "notes": list(self.notes),
        }


def plan_injection(source: Checkpoint, spec: AdapterSpec) -> InjectPlan:
    """Choose the layers and settle the settings; only headers and the configuration are read.

    Returns:
        The plan. Layers are those of the model that transformers builds from the configuration; of one that it does
        not know, they are guessed from the names and shapes of tensors, and the notes say so.

    Raises:
        CheckpointError: when the checkpoint is damaged, quantised or compressed, or what is to be copied is not in it.
        TargetError: when the targets match nothing, or PEFT reads them otherwise.
        ConfigError: when a setting does not fit a layer.
    """
    index = read_index(source)
    index.require_plain()  # else its headers do not tell the shapes of its layers
    model, notes = _outline(index)
    names = names_in(model, index) if not notes else TensorNames(index)
    spec, more = _for_task(names, model, spec, guessed=bool(notes))
    asked = spec
    spec, left_out = _readable(index, model, spec)
    spec = resolve(model, spec)
    modules = dict(candidates(model, everything=True))
    layers = {name: shape_of(modules[name]) for name in spec.targets.select(modules)}
    _refuse_misread(index, spec, layers)
    copied = _copied(names, model, spec, layers, asked.targets.modules_to_save)
    parameters, stored = {}, sum(info.nbytes for info in copied.values())
    for name, shape in layers.items():
        with torch.device("meta"):
            adapter = spec.build(name, *shape)
        parameters[name] = sum(parameter.numel() for parameter in adapter.parameters())
        stored += sum(tensor.nbytes for tensor in adapter.state_dict().values())
    forms = forms_of({name: modules[name] for name in layers})
    remarks = (*index.notes, *notes, *more, *_shared(names, layers))
    return InjectPlan(index, spec, layers, parameters, stored, copied, left_out, remarks, forms)


def inject(
    source: Path, out: Path, spec: AdapterSpec, *, seed: int = 0, overwrite: bool = False, progress: Progress = silent
) -> InjectPlan:
    """Write a fresh, untrained adapter in PEFT's format.

    Args:
        spec: as asked: targets and settings may be left open.

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
    extra = {name: stored.read() for name, stored in plan.copied.items()}
    with publishing(out, overwrite=overwrite) as folder:
        write_adapter(AdapterState(plan.spec, layers, extra, *plan.forms), folder)
    return plan


def _outline(index: CheckpointIndex) -> tuple[nn.Module, tuple[str, ...]]:
    """The modules of the model, without numbers; and whether they are guessed, in words."""
    if index.config:
        try:
            return outline_model(index.root), ()
        except (BackendError, CheckpointError) as error:
            reason = str(error).removeprefix(f"{index.root}: ")
    else:
        reason = "there is no config.json"
    kind = index.config.get("model_type")
    shapes = {name: info.shape for name, info in index.tensors.items()}
    guessed = f"layers were guessed from the names and shapes of tensors, and PEFT may see others: {reason}"
    return skeleton(shapes, kind if isinstance(kind, str) else None), (guessed,)


def _for_task(
    names: TensorNames, model: nn.Module, spec: AdapterSpec, *, guessed: bool
) -> tuple[AdapterSpec, tuple[str, ...]]:
    """The specification with its task, and with the head that PEFT expects for it; and what is odd about that."""
    task = spec.task_type or task_of(names.index.config)
    heads = trained_heads(model, task)
    inside = [f"{head}.{key}" for head in heads for key in model.get_submodule(head).state_dict()]
    absent = [name for name in inside if names.find(name) is None]
    if spec.task_type is None and not guessed:
        task = callable_task(task, inspect.signature(model.forward).parameters)
    elif spec.task_type is None and task in ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        task = None  # how the model is called cannot be seen
    if absent:
        note = f"the head {', '.join(heads)} is not in the files: it is not trained, and the adapter has no task"
        return replace(spec, task_type=None), (note,)
    saved = tuple(dict.fromkeys((*spec.targets.modules_to_save, *heads)))
    return replace(spec, task_type=task, targets=replace(spec.targets, modules_to_save=saved)), ()


def _readable(index: CheckpointIndex, model: nn.Module, spec: AdapterSpec) -> tuple[AdapterSpec, dict[str, str]]:
    """all-linear as the layers that it means and that PEFT finds, and the reasons of what it leaves out."""
    if spec.targets.target_modules != ALL_LINEAR:
        return spec, {}
    names, left_out = all_linear(model, spec)
    misread = misread_by_peft(index.config.get("model_type"), spec.method.peft_type, names)
    readable = tuple(name for name in names if name not in misread)
    return replace(spec, targets=replace(spec.targets, target_modules=readable)), left_out | misread


def _shared(names: TensorNames, layers: Iterable[str]) -> tuple[str, ...]:
    """What to know where several of the layers have the same weight."""
    by_weight: dict[str, list[str]] = {}
    for layer in layers:
        parameter = names.find(f"{layer}.weight")
        if parameter is not None:
            by_weight.setdefault(parameter.name, []).append(layer)
    together = [group for group in by_weight.values() if len(group) > 1]
    if not together:
        return ()
    return (
        f"{sum(map(len, together))} layers share their weights with others (such as {' and '.join(together[0])}): each"
        " has an update in a live model, and all have the sum of them once merged, as in PEFT",
    )


def _refuse_misread(index: CheckpointIndex, spec: AdapterSpec, layers: Iterable[str]) -> None:
    misread = misread_by_peft(index.config.get("model_type"), spec.method.peft_type, layers)
    if misread:
        name, reason = next(iter(misread.items()))
        raise TargetError(
            f"target_modules: expected layers that PEFT adapts as they are named, got {name} and {len(misread) - 1}"
            f" more, and {reason}. Use --exclude-modules, or --method."
        )


def _copied(
    names: TensorNames, model: nn.Module, spec: AdapterSpec, layers: Mapping[str, object], asked: tuple[str, ...]
) -> dict[str, StoredParameter]:
    """What is trained whole: modules_to_save and biases, as `live.attach.state_of` names them."""
    targets = spec.targets
    wanted = {name: name for name in model.state_dict() if targets.saves(name)}
    for wanted_module in asked:
        if not any(replace(targets, modules_to_save=(wanted_module,)).saves(name) for name in wanted):
            raise TargetError(
                f"modules_to_save: expected names, or ends of names, in {names.index.root}, got {wanted_module}."
            )
    for module, host in model.named_modules():
        chosen = module in layers if targets.bias.endswith("_only") else targets.bias == "all"
        if chosen and host._parameters.get("bias") is not None and f"{module}.bias" not in wanted:
            wanted[f"{module}.base_layer.bias" if module in layers else f"{module}.bias"] = f"{module}.bias"
    stored = {parameter: names.find(parameter) for parameter in wanted.values()}
    absent = [name for name, found in stored.items() if found is None]
    if absent:
        raise CheckpointError(
            f"{names.index.root}: expected files with all that is to be trained whole, got none of {named(absent)}."
            " Choose other modules_to_save, or another bias."
        )
    return {name: found for name, parameter in wanted.items() if (found := stored[parameter]) is not None}
