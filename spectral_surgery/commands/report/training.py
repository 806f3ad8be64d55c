"""The course of a training, from the file of metrics that healing, train or swap left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectral_surgery.commands.report.drawing import Point, Series, chart, number
from spectral_surgery.commands.report.page import Cell, Figure, Section, table
from spectral_surgery.commands.report.records import cell, is_number, listed, mapping, numbers, pairs, words

Curve = Sequence[tuple[float, float]]

_SPAN = 20  # ratio of values above which an axis is logarithmic


def healing_section(metrics: Mapping[str, Any]) -> tuple[Section, ...]:
    """What ``heal.json`` says; none where it says nothing."""
    course = mapping(metrics.get("curve"))
    train, held_out = pairs(course.get("train")), pairs(course.get("held_out"))
    if not train and not held_out:
        return ()
    facts = {
        name: words(metrics[key])
        for name, key in (
            ("Objective", "objective"),
            ("Held-out loss before", "held_out_before"),
            ("Held-out loss after", "held_out_after"),
            ("Coefficients trained", "trained_coefficients"),
            ("Step kept", "best_step"),
        )
        if metrics.get(key) is not None
    }
    blocks = {name: listed(row) for name, row in mapping(metrics.get("blocks")).items()}
    rows = [(name, row[0], row[1]) for name, row in blocks.items() if len(row) == 2 and all(map(is_number, row))]
    figures = curves("Loss", {"training": train, "held out": held_out}, metrics.get("best_step"))
    before_after = before_and_after("Held-out error of each block", "block", rows)
    return (Section("Healing", facts=facts, figures=(*figures, *before_after)),)


def training_section(metrics: Mapping[str, Any], title: str = "Training") -> tuple[Section, ...]:
    """What ``metrics.json`` of train says; none where it says nothing."""
    held_out = [row for row in listed(metrics.get("held_out")) if is_number(mapping(row).get("step"))]
    measures = list(dict.fromkeys(name for row in held_out for name in numbers(row) if name not in ("step", "epoch")))
    by_measure = {
        name: [(float(row["step"]), float(row[name])) for row in held_out if is_number(row.get(name))]
        for name in measures
    }
    train = pairs(metrics.get("train_loss"))
    if not train and not by_measure:
        return ()
    step = metrics.get("best_step")
    figures = curves("Loss", {"training": train, "held out": by_measure.pop("loss", [])}, step)
    for name, points in by_measure.items():
        figures += curves(f"Held-out {name}", {"held out": points}, step)
    before, after = numbers(metrics.get("before")), numbers(metrics.get("after"))
    rows: list[dict[str, Cell]] = [
        {"held out": name, "before": before.get(name), "after": after.get(name)}
        for name in dict.fromkeys([*before, *after])
        if name != "epoch"
    ]
    test: list[dict[str, Cell]] = [
        {"test": name, "value": value} for name, value in numbers(metrics.get("test")).items()
    ]
    facts = {
        name: words(metrics[key])
        for name, key in (
            ("Task", "task"),
            ("Examples", "examples"),
            ("Steps", "steps"),
            ("Step kept", "best_step"),
            ("Decided by", "decided_by"),
            ("Seconds", "seconds"),
            ("Parameters trained", "trainable_parameters"),
            ("Parameters of the model", "all_parameters"),
        )
        if metrics.get(key) is not None
    }
    settings = settings_table("Settings of the training", mapping(metrics.get("settings")))
    tables = (*table("Before and after", rows), *table("Test", test), *settings)
    return (Section(title, facts=facts, figures=figures, tables=tables),)


def settings_table(title: str, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Settings by name, as a table; what is empty is left out."""
    rows: list[dict[str, Cell]] = [
        {"setting": name, "value": words(value)}
        for name, value in sorted(settings.items())
        if value is not None and value not in ([], {}, "")
    ]
    return table(title, rows)


def curves(title: str, values: Mapping[str, Curve], best_step: object) -> tuple[Figure, ...]:
    """Lines over the steps, with the step that was kept marked; none without values."""
    kinds = {"training": "first", "held out": "second"}
    known = {name: points for name, points in values.items() if points}
    if not known:
        return ()
    every = [y for points in known.values() for _, y in points]
    log = min(every) > 0 and max(every) / min(every) > _SPAN
    series = [
        Series(
            name,
            kinds[name],
            tuple(Point(x, y, f"{name}, step {number(x)}: {number(y)}") for x, y in points),
            dotted=len(points) <= 60,
        )
        for name, points in known.items()
    ]
    best = numbers({"step": best_step}).get("step")
    mark = (best, f"kept: step {number(best)}") if best is not None else None
    drawings = chart(series, ("step", title.lower() + (", logarithmic" if log else "")), log=log, mark=mark)
    ends = "; ".join(f"{name} from {number(points[0][1])} to {number(points[-1][1])}" for name, points in known.items())
    legend = tuple((curve.kind, curve.name) for curve in series) if len(series) > 1 else ()
    return (Figure(title, f"Line chart of {title.lower()} by step: {ends}", drawings, "", legend),)


def before_and_after(title: str, what: str, rows: Sequence[tuple[Any, float, float]]) -> tuple[Figure, ...]:
    """A value of numbered parts, before and after something; none without parts."""
    if not rows:
        return ()
    numbered = [(float(n) if is_number(n) else float(place), n, *row) for place, (n, *row) in enumerate(rows)]
    series = [
        Series(
            name,
            kind,
            tuple(Point(x, row[at], f"{what} {cell(n)}, {name}: {number(row[at])}") for x, n, *row in numbered),
        )
        for at, (name, kind) in enumerate((("before", "second"), ("after", "first")))
    ]
    label = f"Line chart of {title.lower()}, before and after, for {len(rows)} of them"
    drawings = chart(series, (what, "relative error"))
    return (Figure(title, label, drawings, "", tuple((curve.kind, curve.name) for curve in series)),)
