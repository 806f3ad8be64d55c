"""Pages of merged, swapped and trained models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectral_surgery.cards.card import as_repository
from spectral_surgery.cards.checkpoints import merged_card
from spectral_surgery.commands.report.adapters import METRICS
from spectral_surgery.commands.report.page import Cell, Page, Section, sides, size, table
from spectral_surgery.commands.report.records import card_says, json_of, listed, mapping, numbers, place, words
from spectral_surgery.commands.report.sizes import Stored, bytes_figure, size_bars
from spectral_surgery.commands.report.training import before_and_after, settings_table, training_section
from spectral_surgery.commands.swap import METRICS_FILE as SWAP_METRICS
from spectral_surgery.files.header import TensorInfo
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.merge_record import MergeRecord, adapter_folder
from spectral_surgery.files.merge_record import read_record as read_merge
from spectral_surgery.files.peft.adapter_files import CONFIG_FILE
from spectral_surgery.files.swap_record import SWAP_METHOD
from spectral_surgery.files.swap_record import read_record as read_swap


def merged_page(folder: Path, title: str) -> Page:
    """The page of a folder that merge wrote."""
    index, record = read_index(folder), read_merge(folder)
    command, versions = card_says(folder)
    undo = sum(tensor.nbytes for tensor in record.tensors.values())
    changed = {name: index.tensors[name] for name in record.tensors if name in index.tensors}
    changed_bytes = sum(info.nbytes for info in changed.values())
    figures = {
        "adapters": f"{len(record.weights)}",
        "tensors changed": f"{len(changed):,} of {len(index.tensors):,}",
        "size": size(index.nbytes),
        "record to undo it": size(undo),
        "record / changed": f"{undo / max(changed_bytes, 1):.2%}",
    }
    stored = [
        Stored(name, info.nbytes, "changed" if name in changed else "plain", info.dtype)
        for name, info in index.tensors.items()
    ]
    legend = (("changed", "changed by the merge"), ("plain", "as in the base"))
    sections = (
        Section(
            "How it was made",
            facts=_facts(index, versions),
            command=command or merged_card(record, index).command,
            tables=_adapters(folder, record),
        ),
        Section("Where the bytes are", figures=bytes_figure(stored, legend)),
        Section(
            "Record to undo the merge",
            text="Coded differences from which unmerge gives back the base, bit for bit.",
            figures=size_bars(
                "Bytes of the record by layer",
                "bytes",
                {name: tensor.nbytes for name, tensor in record.tensors.items()},
            ),
        ),
        Section("Changed tensors", tables=_changed(index, record)),
    )
    return Page("Model with adapters merged", title, figures, sections)


def _adapters(folder: Path, record: MergeRecord) -> tuple[Any, ...]:
    rows: list[dict[str, Cell]] = []
    for n, weight in enumerate(record.weights):
        config = json_of(adapter_folder(folder, n), CONFIG_FILE)
        changed = sum(any(s.number == n for s in tensor.sources) for tensor in record.tensors.values())
        rows.append(
            {
                "adapter": n + 1,
                "factor": weight,
                "method": words(config.get("peft_type")),
                "rank": words(config.get("r")),
                "base": place(config.get("base_model_name_or_path")),
                "tensors": changed,
            }
        )
    return table("Adapters", rows)


def _changed(index: CheckpointIndex, record: MergeRecord) -> tuple[Any, ...]:
    rows: list[dict[str, Cell]] = []
    for name, tensor in record.tensors.items():
        info = index.tensors.get(name)
        adapters = sorted({source.number + 1 for source in tensor.sources})
        rows.append(
            {
                "tensor": name,
                "shape": _shape(info),
                "bytes": info.nbytes if info else None,
                "adapters": ", ".join(map(str, adapters)),
                "record": tensor.nbytes,
                "coded as": tensor.coding,
            }
        )
    tied: list[dict[str, Cell]] = [
        {"tensor": alias, "changed together with": name} for alias, name in record.aliases.items()
    ]
    return (*table("Changed", rows), *table("Tied", tied))


def swapped_page(folder: Path, title: str) -> Page:
    """The page of a folder that swap wrote."""
    index = read_index(folder)
    record, metrics = read_swap(mapping(index.config.get("quantization_config"))), json_of(folder, SWAP_METRICS)
    command, versions = card_says(folder)
    parameters, measures = numbers(metrics.get("parameters")), numbers(metrics.get("measures"))
    figures = {"mixer": record.mixer, "layers swapped": f"{len(record.layers)}", "size": size(index.nbytes)}
    figures |= {f"parameters {name}": f"{value:,.0f}" for name, value in parameters.items()}
    facts = _facts(index, versions) | {"Mixer": record.mixer, "Layers": ", ".join(map(str, record.layers))}
    stored = [Stored(name, info.nbytes, "plain", info.dtype) for name, info in index.tensors.items()]
    sections = (
        Section(
            "How it was made",
            facts=facts,
            command=command,
            tables=(
                *settings_table("Settings of the mixer", record.settings),
                *settings_table("Settings of the training", mapping(metrics.get("training"))),
            ),
        ),
        *_fits(metrics),
        *_judged(measures),
        Section("Where the bytes are", figures=bytes_figure(stored, ())),
        Section("All tensors", tables=_all(index)),
    )
    return Page("Model with mixers for attention", title, figures, sections)


def _fits(metrics: Mapping[str, Any]) -> tuple[Section, ...]:
    known = [numbers(row) for row in listed(metrics.get("layer_errors"))]
    rows = [(int(fit["layer"]), fit["before"], fit["after"]) for fit in known if fit.keys() >= _FIT]
    if not rows:
        return ()
    cells: list[dict[str, Cell]] = [
        {"layer": layer, "error before": before, "error after": after} for layer, before, after in rows
    ]
    return (
        Section(
            "How well the new layers fit",
            text="Relative error of their outputs beside those of the attention they replace, on held-out text.",
            figures=before_and_after("Error of each layer", "layer", rows),
            tables=table("Layers", cells),
        ),
    )


_FIT = {"layer", "before", "after"}


def _judged(measures: Mapping[str, float]) -> tuple[Section, ...]:
    names = dict.fromkeys(name.removesuffix("_a").removesuffix("_b") for name in measures)
    rows: list[dict[str, Cell]] = [
        {
            "measure": name,
            "original": measures.get(f"{name}_a"),
            "this model": measures.get(f"{name}_b", measures.get(name)),
        }
        for name in names
    ]
    return (Section("Judged on text", tables=table("Measures", rows)),) if rows else ()


def trained_page(folder: Path, title: str) -> Page:
    """The page of a model that train made from nothing."""
    index, metrics = read_index(folder), json_of(folder, METRICS)
    _, versions = card_says(folder)
    models = [mapping(model) for model in listed(metrics.get("models"))]
    rows: list[dict[str, Cell]] = [
        {"model": words(model.get("init")), **numbers(model), **numbers(model.get("test"))} for model in models
    ]
    if numbers(metrics.get("unigram")):
        rows.append({"model": "unigram", **numbers(metrics.get("unigram"))})
    stored = [Stored(name, info.nbytes, "plain", info.dtype) for name, info in index.tensors.items()]
    parameters = sum(info.numel for info in index.tensors.values())
    data = mapping(metrics.get("data"))
    data = {**data, **{name: place(data[name]) for name in ("file", "tokenizer") if name in data}}
    sections = (
        Section(
            "How it was made",
            facts=_facts(index, versions),
            tables=(
                *settings_table("Sizes", mapping(metrics.get("sizes"))),
                *settings_table("Settings of the training", mapping(metrics.get("settings"))),
                *settings_table("Data", data),
            ),
        ),
        Section("Models side by side", tables=table("Models", rows)),
        *(part for model in models for part in training_section(model, f"Training of {words(model.get('init'))}")),
        Section("Where the bytes are", figures=bytes_figure(stored, ())),
        Section("All tensors", tables=_all(index)),
    )
    return Page(
        "Model trained from nothing", title, {"parameters": f"{parameters:,}", "size": size(index.nbytes)}, sections
    )


def is_swapped(config: Mapping[str, object]) -> bool:
    """Whether a config.json is of a swapped model."""
    return mapping(config.get("quantization_config")).get("quant_method") == SWAP_METHOD


def is_trained(folder: Path) -> bool:
    """Whether a folder has the metrics of a training from nothing."""
    return bool(listed(json_of(folder, METRICS).get("models")))


def _facts(index: CheckpointIndex, versions: str) -> dict[str, str]:
    facts = {
        "Model": as_repository(index.config.get("_name_or_path")) or "",
        "Architecture": words(index.config.get("architectures") or index.config.get("model_type") or ""),
        "Made with": versions,
    }
    return {name: text for name, text in facts.items() if text}


def _all(index: CheckpointIndex) -> tuple[Any, ...]:
    rows: list[dict[str, Cell]] = [
        {"tensor": name, "shape": _shape(info), "bytes": info.nbytes, "dtype": info.dtype}
        for name, info in index.tensors.items()
    ]
    return table("Tensors", rows)


def _shape(info: TensorInfo | None) -> str:
    return sides(info.shape) if info else ""
