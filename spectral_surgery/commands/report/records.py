"""What folders say about how they were made; anybody may have edited it, so only values of the right kind count."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from spectral_surgery.cards.card import as_repository, read_card
from spectral_surgery.commands.report.drawing import number
from spectral_surgery.commands.report.page import Cell, shown
from spectral_surgery.files.header import read_json

_SECTION = re.compile(r"<!-- spectral-surgery:begin \w+ -->(.*?)<!-- spectral-surgery:end -->", re.DOTALL)
_COMMAND = re.compile(r"\A(?:(?!^## ).)*?^```bash\n(spectral-surgery [^\n]*)\n```", re.DOTALL | re.MULTILINE)
_MADE_WITH = re.compile(r"^Made with (.+)\.$", re.MULTILINE)
_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)\.")
_EMBEDDING = re.compile(r"embed|wte|wpe|shared", re.IGNORECASE)


def card_says(folder: Path) -> tuple[str, str]:
    """The command and the versions of what made a folder, from our part of its card; empty where it does not say."""
    section = _SECTION.search((read_card(folder) or "").replace("\r\n", "\n"))
    ours = section.group(1) if section else ""
    command, versions = _COMMAND.search(ours), _MADE_WITH.search(ours)
    return command.group(1) if command else "", versions.group(1) if versions else ""


def json_of(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; empty where there is no such file. Raises CheckpointError when it is damaged."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, Mapping) else {}


def listed(value: object) -> list[Any]:
    """A JSON list; empty for anything else."""
    return value if isinstance(value, list) else []


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers(value: object) -> dict[str, float]:
    """The members of a JSON object that are finite numbers."""
    return {str(name): member for name, member in mapping(value).items() if is_number(member)}


def pairs(value: object) -> list[tuple[float, float]]:
    """The rows of a JSON list that are two finite numbers."""
    rows = [row for row in listed(value) if isinstance(row, list) and len(row) == 2]
    return [(float(x), float(y)) for x, y in rows if is_number(x) and is_number(y)]


def cell(value: object) -> Cell:
    """A JSON value as a cell of a table."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(member)}" for name, member in value.items())
    return ", ".join(str(cell(member)) for member in listed(value))


def words(value: object) -> str:
    """A JSON value as text; empty for null."""
    plain = cell(value)
    if isinstance(plain, float) and math.isfinite(plain):
        return number(plain)
    return "" if plain is None else shown(plain)


def place(value: object) -> str:
    """A repository, or the last part of a path: pages are shown to others, and folders are of one machine."""
    text = words(value)
    return as_repository(text) or PureWindowsPath(text).name


def layers(names: Iterable[str]) -> dict[str, str]:
    """The layer that each tensor or module is in: ``layer 3``, or what it is called where layers have no numbers.

    In the order of a model: embeddings, layers by number, the rest.
    """
    parts: dict[str, tuple[str, int | None]] = {}
    for name in names:
        numbered = _NUMBERED.match(name)
        if numbered:
            parts[name] = numbered.group(1) or "", int(numbered.group(2))
        else:
            parts[name] = name.removesuffix(".weight").removesuffix(".bias"), None
    stacks = dict.fromkeys(prefix for prefix, number in parts.values() if number is not None)
    heads = {prefix.split(".")[0] for prefix, _ in parts.values()}

    def order(name: str) -> tuple[object, ...]:
        prefix, number = parts[name]
        if number is None:
            return (0 if _EMBEDDING.search(prefix) else 2, prefix, 0, name)
        return (1, prefix, number, name)

    def label(prefix: str, number: int | None) -> str:
        if number is None:
            path = prefix.split(".")
            return path[1] if len(heads) == 1 and len(path) > 1 else path[0]
        return f"layer {number}" if len(stacks) == 1 else f"{_short(prefix, list(stacks))} {number}"

    return {name: label(*parts[name]) for name in sorted(parts, key=order)}


def _short(prefix: str, every: list[str]) -> str:
    """The part of a prefix by which it differs from the others."""
    path = prefix.split(".")
    others = [other.split(".") for other in every if other != prefix]
    return next((part for n, part in enumerate(path) if all(part not in other for other in others)), prefix)


def short(name: str, layer: str) -> str:
    """The name of a tensor inside its layer."""
    rest = _NUMBERED.sub("", name, count=1) if _NUMBERED.match(name) else name
    return rest.removesuffix(".weight").removeprefix(f"{layer}.") or name
