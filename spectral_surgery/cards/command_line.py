"""The command that makes a folder again, as a person would type it: repositories by name, and no path of a machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.adapters.from_update.fit_update import Size
from spectral_surgery.files.compressed.difference import base_name
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.targets import ModuleTargets
from spectral_surgery.training.settings import TrainSettings

SOURCE, BASE = "SOURCE", "BASE"  # in stored commands; a card names the repository instead, where it is known
_PROGRAM = "spectral-surgery"
_TARGETS = {"density": "sparsity"}
_NOT_OPTIONS = ("head_learning_rate", "max_grad_norm", "device")  # follow from others, or are of a machine
_DTYPES = {"BF16": "bfloat16", "F16": "float16"}


def command_line(command: str, places: Sequence[str], options: Mapping[str, object]) -> str:
    """A command as text for a shell.

    ``options``: by name. True is a flag, a list repeats the option, a tuple is one value with commas; what is None,
    False or empty is left out.
    """
    words = [_PROGRAM, command, *places]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [word for item in value for word in (option, _text(item))]
        elif value or type(value) in (int, float):
            words += [option, ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value)]
    return shlex.join(words)


def stored_command(text: object, place: str, repository: str | None) -> str:
    """A command read from a file, with the name of a repository in it; empty for anything that is not one line.

    ``place``: SOURCE or BASE.
    """
    if not isinstance(text, str) or not text.startswith(f"{_PROGRAM} ") or not text.isprintable() or "```" in text:
        return ""
    return text.replace(f" {place} ", f" {repository} ", 1) if repository else text


def compress_command(options: CompressOptions) -> str:
    """The command that makes the same bytes; text is named by its checksum elsewhere, not by its path."""
    chosen = changed(options)
    del chosen["target"]
    if not (options.calibration or options.importance):
        chosen.pop("allocation", None)  # without text there is one only
    chosen |= {
        "include": list(options.include),
        "exclude": list(options.exclude),
        "base": base_name({"base": options.base}),
        "calibrate": "TEXT" if options.calibration else None,
        "keep": "important" if options.importance else None,
    }
    target = {_TARGETS.get(options.target.kind, options.target.kind): options.target.value or True}
    asked = {name: value for name, value in chosen.items() if name not in ("calibration", "importance")}
    return command_line("compress", (SOURCE, "OUT"), target | asked)


def healed_command(command: str) -> str:
    """The command of a compression that was healed afterwards."""
    return command if not command or command.endswith(" --heal TEXT") else f"{command} --heal TEXT"


def train_command(spec: AdapterSpec, task: str, settings: TrainSettings, data: Mapping[str, Any]) -> str:
    """The command that trains the same adapter. ``data``: `TrainData.to_json`."""
    asked = {name: value for name, value in changed(settings).items() if name not in _NOT_OPTIONS}
    read = {"columns": tuple(data["columns"]), **{name: data.get(name) for name in ("seq_length", "eval_fraction")}}
    options = {
        "data": "DATA",
        "method": spec.method.name,
        "task": task,
        "o": setting_options(spec.config),
        **target_options(spec.targets),
        **asked,
        **read,
        "eval_data": "HELD_OUT" if data.get("eval_data") else None,
    }
    return command_line("train", (BASE, "OUT"), options)


def changed(settings: Any) -> dict[str, object]:
    """Fields of a dataclass that are not at their default."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(settings)
    }
    return {name: getattr(settings, name) for name, default in defaults.items() if getattr(settings, name) != default}


def size_options(size: Size | None, unit: str, dtype: str) -> dict[str, object]:
    """Options that ask for a size, and for how numbers are stored."""
    asked: dict[str, object] = {} if size is None else {unit if size.kind == "count" else size.kind: size.value}
    return asked | {"dtype": _DTYPES.get(dtype)}


def setting_options(config: Any) -> list[str]:
    """The values of -o: settings that are not at their default."""
    return [
        f"{name}={json.dumps(value) if isinstance(value, (bool, Mapping)) else value}"
        for name, value in changed(config).items()
        if value is not None
    ]


def target_options(targets: ModuleTargets) -> dict[str, object]:
    """Options that name the modules of an adapter and what is trained beside it."""
    bias = "only" if targets.bias.endswith("_only") else targets.bias
    return {
        "target_modules": targets.target_modules,
        "exclude_modules": targets.exclude_modules,
        "layers": targets.layers_to_transform,
        "modules_to_save": targets.modules_to_save,
        "bias": None if bias == "none" else bias,
    }


def _text(value: object) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
