"""English text that every Python carries: the topics of its language reference, to calibrate benchmarks on."""

from __future__ import annotations

import re
from pathlib import Path

_SHORTEST, _LONGEST = 60, 400  # characters of a passage
_HELD_OUT = 5  # the last fifth of the paragraphs
_FEWEST_LETTERS = 0.75  # of a passage: code and grammar are left out


def passages() -> list[str]:
    """Paragraphs, in the order of the topics."""
    from pydoc_data.topics import topics

    found = []
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            letters = sum(own.isalpha() for own in line)
            if _SHORTEST <= len(line) <= _LONGEST and letters >= _FEWEST_LETTERS * len(line):
                found.append(line)
    return found


def write_passages(file: Path, count: int) -> Path:
    """Write some of the paragraphs, evenly chosen, one a line.

    Args:
        file: to write.
        count: paragraphs at most.
    """
    found = passages()
    file.write_text("\n".join(found[:: max(1, len(found) // count)][:count]) + "\n", encoding="utf-8")
    return file


def write_split(folder: Path) -> tuple[Path, Path]:
    """Write the paragraphs as one text to train on and one to judge on, without a paragraph in both.

    Args:
        folder: in which both are written.

    Returns:
        The file to train on and the file to judge on, a paragraph a line.
    """
    found = list(dict.fromkeys(passages()))
    edge = len(found) - len(found) // _HELD_OUT
    train, held_out = folder / "reference-train.txt", folder / "reference-held-out.txt"
    for file, part in ((train, found[:edge]), (held_out, found[edge:])):
        file.write_text("\n".join(part) + "\n", encoding="utf-8")
    return train, held_out
