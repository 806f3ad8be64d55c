"""Pages of adapters in PEFT's format."""

from __future__ import annotations

import re
from pathlib import Path

from spectral_surgery.cards.adapters import adapter_card
from spectral_surgery.commands.report.page import Cell, Page, Section, sides, size, table
from spectral_surgery.commands.report.records import card_says, json_of, place, words
from spectral_surgery.commands.report.sizes import Stored, bytes_figure, size_bars
from spectral_surgery.commands.report.training import settings_table, training_section
from spectral_surgery.files.header import TensorInfo, read_json
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import CONFIG_FILE

METRICS = "metrics.json"
_PREFIX = "base_model.model."
_NAMED = ("peft_type", "base_model_name_or_path", "task_type", "peft_version")


def adapter_page(folder: Path, title: str) -> Page:
    """The page of an adapter."""
    config, index = read_json(folder / CONFIG_FILE), read_index(folder, adapters=True)
    metrics = json_of(folder, METRICS)
    command, versions = card_says(folder)
    method = words(config.get("peft_type"))
    layers: dict[str, list[TensorInfo]] = {}
    for name, info in index.tensors.items():
        layers.setdefault(layer_of(name, method), []).append(info)
    parameters = sum(info.numel for info in index.tensors.values())
    facts = {
        "Method": method,
        "Base model": place(config.get("base_model_name_or_path")),
        "Task": words(config.get("task_type")),
        "Made with": versions or (f"PEFT {config['peft_version']}" if config.get("peft_version") else ""),
    }
    facts = {name: text for name, text in facts.items() if text}
    command = command or adapter_card(config, index, metrics).command
    stored = [
        Stored(layer, sum(i.nbytes for i in infos), "q3", f"{sum(i.numel for i in infos):,} parameters")
        for layer, infos in layers.items()
    ]
    sizes = {layer: sum(info.numel for info in infos) for layer, infos in layers.items()}
    rows: list[dict[str, Cell]] = [
        {
            "tensor": name.removeprefix(_PREFIX),
            "shape": sides(info.shape),
            "parameters": info.numel,
            "bytes": info.nbytes,
            "dtype": info.dtype,
        }
        for name, info in index.tensors.items()
    ]
    figures = {
        "method": method,
        "parameters": f"{parameters:,}",
        "size": size(index.nbytes),
        "modules": f"{len(layers):,}",
    }
    settings = settings_table("Settings", {key: value for key, value in config.items() if key not in _NAMED})
    where = (*bytes_figure(stored, (), "module"), *size_bars("Parameters by layer", "parameters", sizes))
    sections = (
        Section("How it was made", facts=facts, command=command, tables=settings),
        Section("Where the bytes are", figures=where),
        *training_section(metrics),
        Section("All tensors", tables=table("Tensors", rows)),
    )
    return Page("Adapter", title, figures, sections)


def layer_of(name: str, method: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    parts = name.removeprefix(_PREFIX).split(".")
    ours = re.compile(rf"{re.escape(method.lower())}_|lora_|modules_to_save$|base_layer$")
    ends = [place for place, part in enumerate(parts) if place and ours.match(part)]
    return ".".join(parts[: ends[0] if ends else max(len(parts) - 1, 1)])
