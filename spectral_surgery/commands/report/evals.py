"""Pages of what eval printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectral_surgery.commands.report.drawing import Point, Series, chart, number
from spectral_surgery.commands.report.page import Cell, Figure, Page, Section, sides, table
from spectral_surgery.commands.report.records import is_number, listed, mapping, numbers, words
from spectral_surgery.commands.report.sizes import rate_figure

_COST = ("bits_per_weight", "bytes", "relative_error", "seconds", "peak_bytes")
_BEST_AT_ONE = ("cosine", "spearman", "same_top")


def is_eval(body: Mapping[str, Any]) -> bool:
    """Whether JSON is what ``eval --json`` prints."""
    return isinstance(body.get("models"), list) and isinstance(body.get("measures"), Mapping)


def eval_page(body: Mapping[str, Any], title: str) -> Page:
    """The page of a comparison."""
    models = [mapping(row) for row in listed(body["models"])]
    rows: list[dict[str, Cell]] = [
        {"model": words(row.get("model")), **{name.replace("_", " "): value for name, value in numbers(row).items()}}
        for row in models
    ]
    tensors: list[dict[str, Cell]] = [
        {
            "tensor": words(row.get("name")),
            "shape": sides(listed(row.get("shape"))),
            "relative error": row["relative_error"],
        }
        for row in map(mapping, listed(body.get("tensors")))
        if is_number(row.get("relative_error"))
    ]
    figures = {"models": f"{len(models)}"} if models else {}
    if is_number(body.get("relative_error")):
        figures |= {"relative error": f"{body['relative_error']:.4f}", "tensors that differ": f"{len(tensors):,}"}
    if is_number(body.get("equal_tensors")):
        figures["tensors equal"] = f"{body['equal_tensors']:,}"
    points = [
        (words(row["model"]), row["bits_per_weight"], row["relative_error"])
        for row in map(_known, models)
        if {"model", "bits_per_weight", "relative_error"} <= row.keys()
    ]
    sections = [
        Section("Models", tables=table("Models", rows)) if rows else None,
        Section("Rate and quality", figures=(*rate_figure(points, named=True, what="model"), *_by_rate(models))),
        Section("Measures", tables=_measures(body)),
        Section("Tensors that differ", tables=table("Tensors", tensors)),
    ]
    filled = tuple(section for section in sections if section and (section.figures or section.tables))
    return Page("Comparison of models", title, figures, filled)


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**numbers(row), **({"model": row["model"]} if "model" in row else {})}


def _by_rate(models: Sequence[Mapping[str, Any]]) -> tuple[Figure, ...]:
    """A chart over bits per weight for each measure, beside the first model where that has it too."""
    rows = [_known(row) for row in models]
    lossy = [row for row in rows if "bits_per_weight" in row and row.get("relative_error", 0) > 0]
    figures = []
    for name in dict.fromkeys(name for row in lossy for name in row if name not in (*_COST, "model")):
        points = tuple(
            Point(
                row["bits_per_weight"],
                row[name],
                f"{words(row.get('model'))}\n{number(row['bits_per_weight'])} bits, {name} {number(row[name])}",
                words(row.get("model")),
            )
            for row in lossy
            if name in row
        )
        plain = next((row for row in rows if row not in lossy and name in row), None)
        level = (plain[name], words(plain.get("model"))) if plain else None
        values = [point.y for point in points] + ([level[0]] if level else [])
        log = min(values) > 0 and max(values) / min(values) > 20 and name not in _BEST_AT_ONE
        words_of = name.replace("_", " ")
        drawings = chart(
            [Series(words_of, "first", points, joined=False)],
            ("stored bits per weight", words_of + (", logarithmic" if log else "")),
            log=log,
            level=level,
        )
        label = f"Scatter chart of {words_of} over bits per weight for {len(points)} models"
        caption = "" if level is None else f"The dotted line is {level[1]} as it is."
        figures.append(Figure(words_of.capitalize(), label, drawings, caption))
    return tuple(figures)


def _measures(body: Mapping[str, Any]) -> tuple[Any, ...]:
    measures = numbers(body["measures"])
    names = dict.fromkeys(name.removesuffix("_a").removesuffix("_b") for name in measures)
    rows: list[dict[str, Cell]] = [
        {
            "measure": name.replace("_", " "),
            "A": measures.get(f"{name}_a"),
            "B": measures.get(f"{name}_b"),
            "A and B": measures.get(name),
        }
        for name in names
    ]
    return table("Measures", rows)
