"""Text to train and judge on, from text, JSONL and CSV files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar, cast

from spectral_surgery.errors import ConfigError

Label = float | str
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One text, or a pair of texts, and what is said of it.

    Attributes:
        texts: one or two.
        label: a number or the name of a class; None for plain text.
    """

    texts: tuple[str, ...]
    label: Label | None = None


def read_examples(file: Path, columns: Sequence[str] = ()) -> list[Example]:
    """Read examples; labels that are numbers throughout are floats.

    Raises ConfigError when the file cannot be read as that, or a column is missing.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: expected a text, .csv or .jsonl file, got no such file.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: expected a text, .csv or .jsonl file in UTF-8, got other bytes.") from None
    if file.suffix == ".csv":
        examples = _csv(file, text, columns)
    elif file.suffix in (".jsonl", ".json"):
        examples = _jsonl(file, text, columns)
    else:
        examples = [Example((text,))] if text.strip() else []
    if not examples:
        raise ConfigError(f"{file}: expected some text, got an empty file.")
    if all(example.label is not None and _is_number(str(example.label)) for example in examples):
        return [Example(example.texts, float(str(example.label))) for example in examples]
    return examples


def documents(file: Path, *, causal: bool) -> list[Example]:
    """The texts of a file that stand by themselves: of a language model every text, of any other every line."""
    texts = [text for example in read_examples(file) for text in example.texts]
    if not causal:
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    return [Example((text,)) for text in texts]


def split_examples(examples: Sequence[T], *fractions: float) -> list[list[T]]:
    """Cut text, or what else there is, into parts that share no document: what is left, and one of each fraction.

    Documents are drawn at random, since files are often sorted, and by the same numbers in every run, so that runs with
    other seeds are judged on the same text. A single document is cut, and its end is held out.

    Raises ConfigError when the fractions, or too little text, leave a part empty.
    """
    if min(fractions) <= 0 or sum(fractions) >= 1:
        got = ", ".join(f"{fraction:g}" for fraction in fractions)
        raise ConfigError(f"fractions to hold out: expected numbers above 0 with a sum below 1, got {got}.")
    only = examples[0] if len(examples) == 1 else None
    single = only.texts[0] if isinstance(only, Example) else None
    count = len(examples) if single is None else len(single)
    sizes = [max(1, round(fraction * count)) for fraction in fractions]
    if sum(sizes) >= count:
        unit = "documents" if single is None else "characters"
        raise ConfigError(f"text: expected more than {sum(sizes)} {unit} for {len(sizes) + 1} parts, got {count}.")
    edges = [*accumulate([0, count - sum(sizes), *sizes])]
    if single is not None:
        return [[cast(T, Example((single[start:stop],)))] for start, stop in pairwise(edges)]
    order = random.Random(0).sample(list(examples), count)  # noqa: S311 - no secret
    return [order[start:stop] for start, stop in pairwise(edges)]


def _csv(file: Path, text: str, columns: Sequence[str]) -> list[Example]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows:
        return []
    header = rows[0]
    named = set(columns) <= set(header) if columns else not _is_number(header[-1])
    names = header if named else [str(place) for place in range(len(header))]
    wanted = list(columns) if named and columns else names
    if columns and not named and len(columns) != len(header):
        raise ConfigError(f"{file}: expected columns {', '.join(columns)}, got {', '.join(header)}.")
    places = [names.index(name) for name in wanted]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ConfigError(f"{file}: row {number}: expected {len(header)} columns, got {len(row)}.")
    body = rows[1:] if named else rows
    if len(places) == 1:
        return [Example((row[places[0]],)) for row in body]
    return [Example(tuple(row[place] for place in places[:-1]), row[places[-1]]) for row in body]


def _jsonl(file: Path, text: str, columns: Sequence[str]) -> list[Example]:
    examples = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{file}: expected a JSON object on each line, got something else on line {number}.")
        names = list(columns) or (["text", "label"] if "label" in row else ["text"])
        missing = [name for name in names if name not in row]
        if missing:
            raise ConfigError(
                f"{file}: line {number}: expected {', '.join(missing)}, got {', '.join(row)}. Use --columns."
            )
        texts = names if len(names) == 1 else names[:-1]
        label = None if len(names) == 1 else row[names[-1]]
        known = label is None or isinstance(label, (int, float, str))
        examples.append(Example(tuple(str(row[name]) for name in texts), label if known else str(label)))
    return examples


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
