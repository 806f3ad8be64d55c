"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

A tensor of the adapter is called ``base_model.model.<module>.<file name of its key>``; biases and modules_to_save keep
their names in the model behind the same prefix. Source: PEFT 0.21, `save_pretrained`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapters.base import AdapterMethod, AdapterSpec, AdapterState
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.atomic import sync, writing_to
from spectral_surgery.files.header import read_header, read_json
from spectral_surgery.files.peft.adapter_config import dialect_of, from_config, settle, to_config
from spectral_surgery.files.peft.lora_files import (
    Plain,
    as_matrices,
    as_stored,
    features,
    is_base_copy,
    is_rows,
    misfits,
    trained_rows,
)
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.files.writer import tensor_entry, write_file

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
# PEFT writes these a second time, with bias = all and where embeddings were resized
_COPY = re.compile(r"\.(original_module|modules_to_save)\.")


def read_adapter(folder: Path) -> AdapterState:
    """Read an adapter that PEFT or `write_adapter` has written.

    Raises:
        CheckpointError: when a file is missing or damaged, the method or a feature is unknown, or tensors are missing,
            unexpected, not finite or of another shape than the settings say; all of them are listed.
    """
    config_file, file = folder / CONFIG_FILE, folder / TENSOR_FILE
    if not folder.is_dir() or not config_file.is_file():
        raise CheckpointError(f"{folder}: expected a folder with an adapter, got no {CONFIG_FILE}.")
    if not file.is_file():
        raise CheckpointError(f"{folder}: {_missing(folder)}")
    config = read_json(config_file)
    spec = from_config(config, str(config_file))
    tensors = {name: read_tensor(info) for name, info in read_header(file).tensors.items()}
    rows = trained_rows({name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}, config, str(file))
    stored, extra, strange = _sorted_out(tensors, spec)
    plain = as_matrices(stored) if spec.method.peft_type == "LORA" else Plain(stored)
    layers = plain.layers
    parameters = {name: choices for name in layers if (choices := _parameters(name, spec))}
    spec = settle(spec, config, [*layers, *(name for choices in parameters.values() for name in choices)])
    spec, absent = _saved_modules(spec, extra)
    matrices = {name: factors for name, factors in layers.items() if name not in parameters}
    if spec.method.peft_type == "LORA":
        strange += misfits(Plain(matrices), config)
    problems = strange + absent + _misfits(matrices, spec) + _not_finite(tensors)
    if not layers and not rows:
        problems.append(f"no tensor of {spec.method.name} is there")
    if problems:
        raise CheckpointError(
            f"{file}: expected what {CONFIG_FILE} says, got {'; '.join(problems)}. Save the adapter again, or fetch it"
            " again."
        )
    return AdapterState(spec, layers, extra, plain.embeddings, plain.kernels, parameters, rows)


def write_adapter(state: AdapterState, folder: Path) -> None:
    """Write an adapter as PEFT would; other files in the folder stay as they are.

    Args:
        state: the adapter, every setting decided.
        folder: created if need be; an adapter in it is replaced once the new one is completely written.

    Raises:
        CheckpointError: when the adapter cannot be said in these files, is not finite, or cannot be written; an
            adapter that was there before is kept.
    """
    method = state.spec.method
    lora = method.peft_type == "LORA"
    layers = as_stored(state) if lora else state.layers
    tensors = {f"{layer}.{method.file_name(k)}": v for layer, factors in layers.items() for k, v in factors.items()}
    tensors |= state.extra
    config = to_config(state.spec, list(state.layers), features(state) if lora else {})
    problems = _misfits(state.layers, state.spec) + _not_finite(tensors)
    if problems or not state.layers:
        what = "; ".join(problems) or "it has no layers"
        raise CheckpointError(f"{folder}: expected a finite and complete adapter to write, got {what}.")
    entries = [tensor_entry(_PREFIX + name, tensor) for name, tensor in tensors.items()]
    text = json.dumps(config, indent=2, sort_keys=True)
    with _written(folder) as part:
        write_file(part(TENSOR_FILE), entries)
        part(CONFIG_FILE).write_bytes(text.encode())


@contextmanager
def _written(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Collect files under other names in a folder, and rename them all at the end.

    The configuration is away while the tensors change, so that a crash never leaves new tensors with old settings.
    """
    parts: dict[str, Path] = {}

    def part(name: str) -> Path:
        parts[name] = folder / f"{name}.{uuid.uuid4().hex}.tmp"
        return parts[name]

    fresh = not folder.exists()
    try:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            yield part
            for path in parts.values():
                sync(path)
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            for name, path in parts.items():
                path.replace(folder / name)
            sync(folder)
    finally:
        for path in parts.values():
            path.unlink(missing_ok=True)
        if fresh:
            with suppress(OSError):
                folder.rmdir()  # only where nothing was put


def _missing(folder: Path) -> str:
    if (folder / _PICKLE).exists():
        return (
            f"expected {TENSOR_FILE}, got {_PICKLE}, a pickle, which can run any code when opened. Load it with PEFT"
            " where you trust it, and save_pretrained it again."
        )
    return f"expected a folder with an adapter, got no {TENSOR_FILE}. Give the folder it was saved in."


def _sorted_out(
    tensors: Mapping[str, Tensor], spec: AdapterSpec
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """(tensors of the adapter by layer and key, other trained tensors, what is neither, in words)."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    strange = []
    for full, tensor in tensors.items():
        name = full.removeprefix(_PREFIX)
        place = _place(name, spec.method)
        if not full.startswith(_PREFIX):
            strange.append(full)
        elif place:
            layers.setdefault(place[0], {})[place[1]] = tensor
        elif not is_rows(name) and not _COPY.search(name):
            rest[name] = tensor
    extra = {name: tensor for name, tensor in rest.items() if _is_extra(name, spec, layers)}
    strange += [_PREFIX + name for name in rest if name not in extra]
    meant = [layer for layer in layers if spec.targets.matches(layer) or _parameters(layer, spec)]
    meant += [layer for layer in layers if spec.targets.ensure_weight_tying]  # the tied modules are not listed
    strange += [f"{_PREFIX}{layer}.*" for layer in layers if layer not in meant]
    return layers, extra, [f"{name} is unexpected" for name in strange]


def _parameters(layer: str, spec: AdapterSpec) -> tuple[str, ...]:
    """Parameters that a layer of target_parameters may mean: of several in one module, PEFT wraps one in the other."""
    module = layer
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return () if spec.targets.matches(layer) else spec.targets.parameters_of(module)


def _place(name: str, method: AdapterMethod[Any]) -> tuple[str, str] | None:
    """(layer, key in its state dict) of a tensor; None where it is not the method's."""
    for key, end in method.file_names.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), key
    layer, separator, key = name.rpartition(f".{method.file_name('')}")
    return (layer, key) if separator and key not in method.file_names else None


def _is_extra(name: str, spec: AdapterSpec, layers: Mapping[str, object]) -> bool:
    if spec.targets.saves(name) or is_base_copy(name, layers):
        return True
    if spec.targets.bias == "all":
        return name == "bias" or name.endswith(".bias")
    return spec.targets.bias != "none" and name.removesuffix(".base_layer.bias") in layers


def _saved_modules(spec: AdapterSpec, extra: Mapping[str, Tensor]) -> tuple[AdapterSpec, list[str]]:
    """The specification with the modules_to_save that are there: PEFT lists all usual names of classifiers."""
    asked = spec.targets.modules_to_save
    names = tuple(
        module for module in asked if any(replace(spec.targets, modules_to_save=(module,)).saves(n) for n in extra)
    )
    absent = [f"nothing of modules_to_save {', '.join(asked)} is there"] if asked and not names else []
    return replace(spec, targets=replace(spec.targets, modules_to_save=names)), absent


def _misfits(layers: Mapping[str, Mapping[str, Tensor]], spec: AdapterSpec) -> list[str]:
    """What is missing, or of another shape than the settings say, in words."""
    sizes = dialect_of(spec.method).sizes
    every = {key: None for factors in layers.values() for key in factors}
    problems = []
    for layer, factors in layers.items():
        expected = sizes(spec.config.for_layer(layer)) if sizes else every
        problems += [
            f"{_PREFIX}{layer}.{spec.method.file_name(key)} is missing" for key in expected if key not in factors
        ]
        for key, tensor in factors.items():
            shape = expected.get(key)
            if shape is not None and not _has_shape(tensor, shape):
                said = ", ".join("any" if size is None else str(size) for size in shape)
                full = f"{_PREFIX}{layer}.{spec.method.file_name(key)}"
                problems.append(f"{full} is {tensor.dtype} of shape {list(tensor.shape)}, not floats of shape [{said}]")
    return problems


def _has_shape(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    fits = all(wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=False))
    return tensor.is_floating_point() and tensor.dim() == len(shape) and fits


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{n} has NaN or infinity" for n, t in tensors.items() if t.is_floating_point() and not _finite(t)]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float()).all())
