"""Folders of images and of sound, with what is said of the files: as the library datasets has them.

A file ``metadata.csv`` or ``metadata.jsonl`` may name files (``file_name``) with a ``text`` or ``transcription`` and a
``label``; without it, a text lies beside its file (``a.wav``, ``a.txt``), and the name of a subfolder is the label.
"""

from __future__ import annotations

import csv
import json
import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from spectral_surgery.errors import ConfigError
from spectral_surgery.inputs.kind import Reading
from spectral_surgery.inputs.model_input import ModelInput

T = TypeVar("T")
_LOG = logging.getLogger("spectral_surgery")
_METADATA = "metadata.csv", "metadata.jsonl"
_TEXTS = "text", "transcription", "sentence", "caption"


class UnreadableError(ConfigError):
    """A file of a folder is not what its name says; the reason says why."""


@dataclass(frozen=True)
class MediaFile:
    """A file of a folder.

    Attributes:
        text: what is said or described in it; empty where that is not known.
        label: its class; empty where that is not known.
    """

    path: Path
    text: str = ""
    label: str = ""


def holds(folder: Path, suffixes: Collection[str]) -> bool:
    """Whether there is a file with one of the suffixes in a folder or below."""
    return folder.is_dir() and any(path.suffix.lower() in suffixes for path in folder.rglob("*"))


def media_files(folder: Path, suffixes: Collection[str]) -> list[MediaFile]:
    """The files of a folder with some suffixes, in an order that is random and always the same.

    Raises:
        ConfigError: when the metadata cannot be read, or names a file that is not there.
    """
    rows = _metadata(folder)
    if rows is None:
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
        files = [MediaFile(path, _beside(path), path.parent.name if path.parent != folder else "") for path in paths]
    else:
        files = [_named(folder, row) for row in rows if Path(row.get("file_name", "")).suffix.lower() in suffixes]
    return random.Random(0).sample(files, len(files))  # noqa: S311 - no secret


def readable(reading: Reading, items: Sequence[T], samples: int, made: Callable[[T], ModelInput]) -> list[ModelInput]:
    """Inputs of the first files, or of what names files; those that cannot be read are refused or left out, as asked.

    Args:
        samples: at most; 0 for all.
        made: the input of one.

    Raises:
        UnreadableError: with the file and the reason, unless such files are to be left out.
    """
    inputs: list[ModelInput] = []
    for item in items:
        if samples and len(inputs) == samples:
            break
        try:
            inputs.append(made(item))
        except UnreadableError as error:
            if reading.data.unreadable == "refuse":
                raise UnreadableError(
                    f"{error} Repair or remove it, or leave such files out: --unreadable skip."
                ) from None
            _LOG.warning("%s It is left out.", error)
    return inputs


def _metadata(folder: Path) -> list[dict[str, str]] | None:
    file = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = list(csv.DictReader(lines)) if file.suffix == ".csv" else [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ConfigError(f"{file}: expected rows in UTF-8 with a file_name each, got others ({error}).") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ConfigError(f"{file}: row {number}: expected a file_name, got none. Name the file of every row.")
    return rows


def _named(folder: Path, row: dict[str, str]) -> MediaFile:
    path = folder / row["file_name"]
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. The metadata of {folder} names it.")
    text = next((str(row[name]) for name in _TEXTS if row.get(name)), "")
    label = row.get("label")
    return MediaFile(path, text, "" if label is None else str(label))


def _beside(path: Path) -> str:
    file = path.with_suffix(".txt")
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
