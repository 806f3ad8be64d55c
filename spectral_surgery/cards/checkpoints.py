"""What the cards of checkpoints say, from the files themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectral_surgery.cards.card import COMPRESSED, as_repository
from spectral_surgery.cards.command_line import BASE, SOURCE, command_line, stored_command
from spectral_surgery.cards.content import CardContent
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.difference import base_name
from spectral_surgery.files.compressed.manifest import SUFFIXES, Manifest
from spectral_surgery.files.header import DTYPE_BITS
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.merge_record import MergeRecord
from spectral_surgery.files.peft.task import class_for, task_of

_LIBRARIES = ("torch", "numba")
_AUTO = {"CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification", "SEQ_2_SEQ_LM": "ForSeq2SeqLM"}


def compressed_card(checkpoint: CompressedCheckpoint, origin: str | None) -> CardContent:
    """The card of a compressed checkpoint. ``origin``: repository it was made from; None asks its configuration."""
    manifest, index = checkpoint.manifest, checkpoint.index
    origin = origin or as_repository(index.config.get("_name_or_path"))
    stored = {f"{name}.{suffix}" for name in manifest.tensors for suffix in SUFFIXES}
    rows = [
        {
            "tensor": f"`{name}`",
            "shape": " x ".join(map(str, record.shape)),
            "bits per weight": record.report.bits_per_weight,
            "relative error": record.report.relative_error,
            "bytes": record.report.stored_bytes,
        }
        for name, record in manifest.tensors.items()
    ]
    base, library = base_name(manifest.options), _library(index)
    values = {
        "total": manifest.report,
        "options": manifest.options,
        "base": base,
        "auto_class": None if base or library is None else _auto_class(index),  # differences are not a model
        "copied": [info for name, info in index.tensors.items() if name not in {*stored, *manifest.lossless}],
        "coded": [index.tensors[name] for name in manifest.lossless],
        "original_bytes": sum(r.report.weights * DTYPE_BITS[r.dtype] // 8 for r in manifest.tensors.values()),
    }
    rows.sort(key=lambda row: -int(str(row["bytes"])))
    command = stored_command(manifest.command, SOURCE, origin)
    return CardContent("compressed", values, command, rows, origin, "quantized", library, (COMPRESSED,), _LIBRARIES)


def decompressed_card(
    manifest: Manifest, index: CheckpointIndex, dtype: str | None, origin: str | None = None
) -> CardContent:
    """The card of a plain checkpoint made from a compressed one."""
    options = {"dtype": dtype, "base": base_name(manifest.options)}
    return CardContent(
        "decompressed",
        {"total": manifest.report, "tensors": len(manifest.tensors)},
        command_line("decompress", (origin or "COMPRESSED", "OUT"), options),
        relation="quantized",
        library_name=_library(index),
        libraries=_LIBRARIES,
    )


def merged_card(record: MergeRecord, index: CheckpointIndex, origin: str | None = None) -> CardContent:
    """The card of a checkpoint with adapters merged into it."""
    base = origin or as_repository(index.config.get("_name_or_path"))
    factors = tuple(f"{weight:g}" for weight in record.weights)
    places = (base or BASE, *(f"ADAPTER_{number + 1}" for number in range(len(factors))), "OUT")
    changed = [index.tensors[name].nbytes for name in record.tensors if name in index.tensors]
    values = {"factors": factors, "changed": len(changed), "changed_bytes": sum(changed), **sizes(index)}
    command = command_line("merge", places, {"weights": factors if set(record.weights) != {1.0} else None})
    return CardContent("merged", values, command, (), base, "merge", _library(index), ("merge",))


def swapped_card(index: CheckpointIndex, report: Mapping[str, Any]) -> CardContent:
    """The card of a checkpoint with mixers in place of attention."""
    base = as_repository(index.config.get("_name_or_path"))
    layers, training = ",".join(map(str, report["layers"])), report["training"] or {}
    options = {
        "mixer": report["mixer"],
        "layers": layers,
        "o": [f"{name}={value}" for name, value in report["settings"].items()],
        "distill": "TEXT" if training else None,
        **{name: training.get(name) for name in ("steps", "end_to_end_steps", "learning_rate", "seed")},
    }
    rows = [
        {"layer": fit["layer"], "relative error of its outputs": fit["after"], "before training": fit["before"]}
        for fit in report["layer_errors"]
    ]
    command = command_line("swap", (base or SOURCE, "OUT"), options)
    values, library = {**report, "layers": layers}, _library(index)
    return CardContent("swapped", values, command, rows, base, "finetune", library, ("swapped",), ("torch",))


def exported_card(index: CheckpointIndex, report: Mapping[str, Any], command: str, origin: str | None) -> CardContent:
    """The card of a model in the format of another program."""
    base = origin or as_repository(index.config.get("_name_or_path"))
    rows = [
        {
            "tensor": f"`{tensor['name']}`",
            "shape": " x ".join(map(str, tensor["shape"])),
            "stored as": tensor["stored_as"],
            "relative error of the export": tensor["export_error"],
        }
        for tensor in report["tensors"]
    ]
    rows.sort(key=lambda row: str(row["tensor"]))
    tags = ("gguf",) if report["target"] == "gguf" else ("compressed-tensors",)
    return CardContent("exported", report, command, rows, base, "quantized", _library(index), tags, _LIBRARIES)


def plain_card(index: CheckpointIndex) -> CardContent:
    """The card of any other checkpoint."""
    base = as_repository(index.config.get("_name_or_path"))
    return CardContent("plain", sizes(index), base_model=base, library_name=_library(index))


def auto_class_of(task: object) -> str:
    """The class of transformers that loads a model of a task, as PEFT names tasks."""
    return f"AutoModel{_AUTO.get(str(task), '')}"


def _auto_class(index: CheckpointIndex) -> str:
    name = auto_class_of(task_of(index.config))
    if class_for(index.config, name) == name:
        return name
    return "AutoModelForImageTextToText" if name != "AutoModel" else name  # it sees before it writes, or only encodes


def sizes(index: CheckpointIndex) -> dict[str, object]:
    """How much a checkpoint holds, and in which dtypes."""
    tensors = index.tensors.values()
    return {
        "tensors": len(tensors),
        "parameters": sum(info.numel for info in tensors),
        "nbytes": index.nbytes,
        "dtypes": sorted({info.dtype for info in tensors}),
    }


def _library(index: CheckpointIndex) -> str | None:
    return "transformers" if "model_type" in index.config else None
