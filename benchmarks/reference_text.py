"""English text that every Python carries: the topics of its language reference, to calibrate benchmarks on."""

from __future__ import annotations

import re
from pathlib import Path

_SHORTEST, _LONGEST = 60, 400  # characters of a passage
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
