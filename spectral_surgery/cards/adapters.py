"""What the cards of adapters and of weight differences say: how they were made, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.cards.card import as_repository
from spectral_surgery.cards.checkpoints import auto_class_of, sizes
from spectral_surgery.cards.command_line import BASE, stored_command
from spectral_surgery.cards.content import CardContent
from spectral_surgery.files.index import CheckpointIndex


class MeasuredLayer(Protocol):
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


def adapter_card(config: Mapping[str, object], index: CheckpointIndex, metrics: Mapping[str, Any]) -> CardContent:
    """The card of an adapter in PEFT's format."""
    method = str(config.get("peft_type"))
    base = as_repository(config.get("base_model_name_or_path"))
    tensors = [
        {"tensor": f"`{name}`", "shape": " x ".join(map(str, info.shape)), "bytes": info.nbytes}
        for name, info in index.tensors.items()
    ]
    measured = _measured(metrics)
    values = {
        "method": method,
        "auto_class": auto_class_of(config.get("task_type")),
        "settings": {key: config[key] for key in sorted(config) if type(config[key]) in (int, float)},
        "training": _training(metrics) if measured else None,
        "source": "",
        **sizes(index),
    }
    command = stored_command(metrics.get("command"), BASE, base) if measured else ""
    libraries = ("torch",) if measured else ()
    rows = measured or tensors
    return CardContent("adapter", values, command, rows, base, "adapter", "peft", (method.lower(),), libraries)


def converted_card(
    spec: AdapterSpec, index: CheckpointIndex, layers: Sequence[MeasuredLayer], unit: str, *, command: str, source: str
) -> CardContent:
    """The card of an adapter that was computed and not trained, measured when it was written.

    ``source``: what it was made from, as the object of "made from".
    """
    config = {"peft_type": spec.method.peft_type, "task_type": spec.task_type}
    card = adapter_card(config | {"base_model_name_or_path": spec.base_model}, index, {})
    values = {**card.values, "source": source, "relative_error": error_of(layers)}
    return replace(card, values=values, command=command, rows=_layer_rows(layers, unit), libraries=("torch",))


def delta_card(
    spec: AdapterSpec, index: CheckpointIndex, layers: Sequence[MeasuredLayer], origin: str | None, command: str
) -> CardContent:
    """The card of the weight differences of an adapter."""
    method = spec.method.name
    values = {"method": method, "relative_error": error_of(layers), **sizes(index)}
    rows, tags = _layer_rows(layers, ""), ("weight-differences", method)
    return CardContent("delta", values, command, rows, origin, "adapter", None, tags, ("torch",))


def _measured(metrics: Mapping[str, Any]) -> list[dict[str, object]]:
    """Measures of the held-out examples before and after training; numbers only, whatever a person did to the file."""
    before, after = _mapping(metrics, "before"), _mapping(metrics, "after")
    names = [name for name in sorted(after) if name != "epoch" and isinstance(after[name], (int, float))]
    return [
        {"held out": name, "before": _number(before.get(name)), "after": _number(after.get(name))} for name in names
    ]


def _training(metrics: Mapping[str, Any]) -> dict[str, object]:
    losses = metrics.get("train_loss")
    points = [row[1] for row in losses if isinstance(row, list) and len(row) == 2] if isinstance(losses, list) else []
    return {
        "examples": {"train": "?", "held_out": "?", **_mapping(metrics, "examples")},
        "steps": metrics.get("steps", "?"),
        "best_step": metrics.get("best_step", "?"),
        "decided_by": metrics.get("decided_by", "loss"),
        "losses": list(map(float, points)) if all(isinstance(point, (int, float)) for point in points) else [],
    }


def error_of(layers: Sequence[MeasuredLayer]) -> float:
    """The relative error of all layers together: norm of what is left over norm of ΔW."""
    whole = sum(layer.energy for layer in layers)
    return math.sqrt(sum(layer.energy * layer.relative_error**2 for layer in layers) / whole) if whole else 0.0


def _layer_rows(layers: Sequence[MeasuredLayer], unit: str) -> list[dict[str, object]]:
    return [
        {"layer": f"`{layer.layer}`", "shape": " x ".join(map(str, layer.shape))}
        | ({unit: layer.components} if unit else {})
        | {"bytes": layer.stored_bytes, "relative error": float(layer.relative_error)}
        for layer in layers
    ]


def _mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> object:
    return float(value) if isinstance(value, (int, float)) else ""
