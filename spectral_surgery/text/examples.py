"""Text to train and judge on, from text, JSONL and CSV files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectral_surgery.errors import ConfigError

Label = float | str


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
    """Read examples.

    Args:
        file: ``.csv``, ``.jsonl``, or plain text, which is one example.
        columns: names of the text columns and, last, of the label. Without: of a CSV file, all columns, the last one
            being the label; of JSON objects, ``text`` alone or with ``label``. A CSV file whose first row does not name
            the columns, and ends with a number, has no header.

    Returns:
        The examples; labels that are numbers throughout are floats.

    Raises:
        ConfigError: when the file cannot be read as that, or a column is missing.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; text, .csv and .jsonl files are accepted. Check the path.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is no UTF-8 text; text, .csv and .jsonl files are accepted.") from None
    if file.suffix == ".csv":
        examples = _csv(file, text, columns)
    elif file.suffix in (".jsonl", ".json"):
        examples = _jsonl(file, text, columns)
    else:
        examples = [Example((text,))] if text.strip() else []
    if not examples:
        raise ConfigError(f"{file}: is empty; some text is accepted.")
    return _with_numbers(examples)


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold some examples back: of one long text the end, else a random choice.

    Args:
        examples: all.
        fraction: to hold back, between 0 and 1.
        seed: of the choice.

    Returns:
        (to train on, held back), without overlap; of two or more examples neither is empty.
    """
    if len(examples) == 1:
        text = examples[0].texts[0]
        cut = round(len(text) * (1 - fraction))
        return [Example((text[:cut],))], [Example((text[cut:],))]
    order = random.Random(seed).sample(range(len(examples)), len(examples))  # noqa: S311 - no secret
    held = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    return [examples[i] for i in sorted(order[held:])], [examples[i] for i in sorted(order[:held])]


def _csv(file: Path, text: str, columns: Sequence[str]) -> list[Example]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows:
        return []
    header = rows[0]
    named = set(columns) <= set(header) if columns else not _is_number(header[-1])
    names = header if named else [str(place) for place in range(len(header))]
    wanted = list(columns) if named and columns else names
    if columns and not named and len(columns) != len(header):
        raise ConfigError(f"{file}: has columns {', '.join(header)}; {', '.join(columns)} were asked for.")
    places = [names.index(name) for name in wanted]
    ragged = [number for number, row in enumerate(rows, 1) if len(row) != len(header)]
    if ragged:
        raise ConfigError(f"{file}: row {ragged[0]} has not the {len(header)} columns of the first one.")
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
            raise ConfigError(f"{file}: line {number} is no JSON object; one object per line is accepted.")
        own = list(columns) or (["text", "label"] if "label" in row else ["text"])
        missing = [name for name in own if name not in row]
        if missing:
            raise ConfigError(
                f"{file}: line {number} has no {', '.join(missing)}, only {', '.join(row)}. Use --columns."
            )
        texts = own if len(own) == 1 else own[:-1]
        label = None if len(own) == 1 else row[own[-1]]
        known = label is None or isinstance(label, (int, float, str))
        examples.append(Example(tuple(str(row[name]) for name in texts), label if known else str(label)))
    return examples


def _with_numbers(examples: list[Example]) -> list[Example]:
    if all(example.label is not None and _is_number(str(example.label)) for example in examples):
        return [Example(example.texts, float(str(example.label))) for example in examples]
    return examples


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
