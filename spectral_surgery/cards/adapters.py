"""What the cards of adapters and of weight differences say: how they were made, and what was measured."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from typing import Any, Protocol

from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.from_update.fit_update import Size
from spectral_surgery.cards.card import Facts, as_repository
from spectral_surgery.cards.checkpoints import AUTO, HERE, linked, short_name
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.peft.adapter_config import from_config
from spectral_surgery.options import settings_of
from spectral_surgery.targets import ModuleTargets
from spectral_surgery.training.trainer import TrainSettings

_TRAINED = ("learning_rate", "head_learning_rate", "max_grad_norm", "device")  # said anyway, or no option
_DTYPES = {"BF16": "bfloat16", "F16": "float16"}

_LOAD_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModel{task}

model = PeftModel.from_pretrained(AutoModel{task}.from_pretrained("{base}"), "{here}")
```"""

_LOAD_DELTA = """\
Every tensor is what has to be added to the weight of the same name of {base}:

```python
import torch
from spectral_surgery import resolve
from safetensors.torch import load_file

for file in resolve("{here}").glob("*.safetensors"):
    for name, delta in load_file(file).items():
        with torch.no_grad():
            model.get_parameter(name).add_(delta)
```"""


class MadeLayer(Protocol):
    """What is known of a layer that was written and measured."""

    @property
    def layer(self) -> str:
        """Name of the module."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    @property
    def components(self) -> int:
        """Kept of it."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tensors."""

    @property
    def relative_error(self) -> float:
        """Measured."""

    @property
    def energy(self) -> float:
        """Of what it stands for: ‖ΔW‖²."""


def adapter_facts(config: Mapping[str, object], index: CheckpointIndex, metrics: Mapping[str, Any]) -> Facts:
    """Facts about an adapter in PEFT's format.

    Args:
        config: its adapter_config.json.
        index: headers of its tensors.
        metrics: what `train` wrote beside it; empty without.

    Returns:
        With metrics, the command and a table of what was measured; else a table of its tensors.
    """
    method = str(config.get("peft_type"))
    base = as_repository(config.get("base_model_name_or_path"))
    settings = {key: config[key] for key in sorted(config) if type(config[key]) in (int, float)}
    tensors = [
        {"tensor": f"`{name}`", "shape": " x ".join(map(str, info.shape)), "bytes": info.nbytes}
        for name, info in index.tensors.items()
    ]
    totals = {
        "tensors": f"{len(tensors)}, {sum(info.numel for info in index.tensors.values()):,} parameters, "
        f"{index.nbytes:,} bytes",
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()) or "the defaults of the method",
    }
    measured = _measured(metrics)
    return Facts(
        f"{method} adapter for {short_name(base)}",
        f"An adapter of the method {method} in the format of PEFT, for {linked(base)}.",
        _train_command(config, metrics, base) if measured else "",
        _LOAD_ADAPTER.format(task=AUTO.get(str(config.get("task_type")), ""), base=base or "BASE_MODEL", here=HERE),
        measured or tensors,
        totals | (_trained(metrics) if measured else {}),
        base,
        "adapter",
        "peft",
        (method.lower(),),
        {"torch": version("torch")} if measured else {},
    )


def made_facts(
    spec: AdapterSpec, index: CheckpointIndex, layers: Sequence[MadeLayer], unit: str, *, command: str, source: str
) -> Facts:
    """Facts about an adapter that was computed and not trained, measured when it was written.

    Args:
        spec: of the adapter.
        index: headers of its tensors.
        layers: what was measured.
        unit: what a component is.
        command: that made it.
        source: what it was made from, as the object of "made from".
    """
    config = {"peft_type": spec.method.peft_type, "task_type": spec.task_type, "base_model_name_or_path": ""}
    facts = adapter_facts(config | {"base_model_name_or_path": spec.base_model}, index, {})
    return Facts(
        facts.title,
        f"{facts.summary} Made from {source}, not trained.",
        command,
        facts.usage,
        _layer_rows(layers, unit),
        {
            "tensors": (facts.totals or {})["tensors"],
            "relative error": f"{_error(layers):.4g}, of ΔW of all layers, measured on what is stored",
        },
        facts.base_model,
        facts.relation,
        facts.library_name,
        facts.tags,
        {"torch": version("torch")},
    )


def delta_facts(
    spec: AdapterSpec, index: CheckpointIndex, layers: Sequence[MadeLayer], origin: str | None, command: str
) -> Facts:
    """Facts about the weight differences of an adapter.

    Args:
        spec: of the adapter.
        index: headers of the differences.
        layers: what was measured: the error of the stored numbers, beside float32.
        origin: repository of the base model, if known.
        command: that made them.
    """
    totals = {
        "tensors": f"{len(index.tensors)}, {sum(info.numel for info in index.tensors.values()):,} numbers, "
        f"{index.nbytes:,} bytes, {', '.join(sorted({info.dtype for info in index.tensors.values()}))}",
        "relative error": f"{_error(layers):.4g}, of all ΔW as stored, beside the same in float32",
    }
    return Facts(
        f"Weight differences of a {spec.method.name} adapter for {short_name(origin)}",
        f"What an adapter of the method {spec.method.name} adds to {linked(origin)}: ΔW of each weight it changes,"
        " under the name of that weight.",
        command,
        _LOAD_DELTA.format(base=linked(origin), here=HERE),
        _layer_rows(layers, ""),
        totals,
        origin,
        "adapter",
        None,
        ("weight-differences", spec.method.name),
        {"torch": version("torch")},
    )


def size_words(size: Size | None, unit: str, dtype: str) -> list[str]:
    """Options that ask for a size, and for how numbers are stored."""
    words = []
    if size is not None:
        option = f"--{unit.replace('_', '-')}" if size.kind == "count" else f"--{size.kind.replace('_', '-')}"
        words += [option, f"{size.value:g}" if size.kind == "max_error" else str(size.value)]
    return words + (["--dtype", _DTYPES[dtype]] if dtype in _DTYPES else [])


def setting_words(config: Any) -> list[str]:
    """-o for each setting that is not at its default."""
    words = []
    for own in settings_of(type(config)):
        value = getattr(config, own.name)
        if value != own.default and value is not None:
            text = json.dumps(value) if isinstance(value, (bool, Mapping)) else str(value)
            words += ["-o", f"{own.name}={text}"]
    return words


def target_words(targets: ModuleTargets) -> list[str]:
    """Options that name the modules of an adapter and what is trained beside it."""
    words = []
    for option, value in (
        ("--target-modules", targets.target_modules),
        ("--exclude-modules", targets.exclude_modules),
        ("--layers", targets.layers_to_transform),
        ("--modules-to-save", targets.modules_to_save),
    ):
        if value:
            words += [option, value if isinstance(value, str) else ",".join(map(str, value))]
    if targets.bias != "none":
        words += ["--bias", "only" if targets.bias.endswith("_only") else targets.bias]
    return words


def _train_command(config: Mapping[str, object], metrics: Mapping[str, Any], base: str | None) -> str:
    """The command that trains the same again, without paths of anybody's machine; empty for methods of others."""
    try:
        spec = from_config(config, "adapter_config.json")
    except (CheckpointError, ConfigError):
        return ""
    words = ["spectral-surgery", "train", base or "BASE", "OUT", "--data", "DATA", "--method", spec.method.name]
    if metrics.get("task"):
        words += ["--task", str(metrics["task"])]
    words += setting_words(spec.config) + target_words(spec.targets)
    known = {own.name: own.default for own in fields(TrainSettings)}
    given = {name: value for name, value in _mapping(metrics, "settings").items() if name in known}
    for name in ("learning_rate", *(name for name in given if name not in _TRAINED)):
        value = given.get(name)
        if value not in (None, False) and (known[name] is MISSING or value != known[name]):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    data = _mapping(metrics, "data")
    if isinstance(data.get("columns"), list) and data["columns"]:
        words += ["--columns", ",".join(map(str, data["columns"]))]
    for name in ("seq_length", "eval_fraction"):
        if isinstance(data.get(name), (int, float)):
            words += [f"--{name.replace('_', '-')}", str(data[name])]
    return shlex.join([*words, *(["--eval-data", "HELD_OUT"] if data.get("eval_data") else [])])


def _measured(metrics: Mapping[str, Any]) -> list[dict[str, object]]:
    """Measures of the held-out examples before and after training; numbers only, whatever a person did to the file."""
    before, after = _mapping(metrics, "before"), _mapping(metrics, "after")
    names = [name for name in sorted(after) if name != "epoch" and isinstance(after[name], (int, float))]
    return [
        {"held out": name, "before": _number(before.get(name)), "after": _number(after.get(name))} for name in names
    ]


def _trained(metrics: Mapping[str, Any]) -> dict[str, str]:
    examples, losses = _mapping(metrics, "examples"), metrics.get("train_loss")
    totals = {
        "trained on": f"{examples.get('train', '?')} examples, {metrics.get('steps', '?')} steps; judged on"
        f" {examples.get('held_out', '?')} others",
        "kept": f"the adapter of step {metrics.get('best_step', '?')}, which has the best"
        f" {metrics.get('decided_by', 'loss')}",
    }
    points = [row[1] for row in losses if isinstance(row, list) and len(row) == 2] if isinstance(losses, list) else []
    if points and all(isinstance(point, (int, float)) for point in points):
        totals["training loss"] = f"{points[0]:.4g} at first, {points[-1]:.4g} at last"
    return totals


def _error(layers: Sequence[MadeLayer]) -> float:
    whole = sum(layer.energy for layer in layers)
    return math.sqrt(sum(layer.energy * layer.relative_error**2 for layer in layers) / whole) if whole else 0.0


def _layer_rows(layers: Sequence[MadeLayer], unit: str) -> list[dict[str, object]]:
    return [
        {"layer": f"`{own.layer}`", "shape": " x ".join(map(str, own.shape))}
        | ({unit: own.components} if unit else {})
        | {"bytes": own.stored_bytes, "relative error": float(own.relative_error)}
        for own in layers
    ]


def _mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = body.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: object) -> object:
    return float(value) if isinstance(value, (int, float)) else ""
