"""Words that are wrong in what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[\w']+")


def words_of(text: str) -> list[str]:
    """The words of a text, small and without punctuation, which transcriptions differ in without being wrong."""
    return _WORD.findall(text.casefold())


def word_edits(wanted: Sequence[str], found: Sequence[str]) -> int:
    """How many words are to be replaced, left out or put in at least; over all words, this is the word error rate.

    Source: Levenshtein, 1966, row by row.
    """
    row = list(range(len(found) + 1))
    for place, word in enumerate(wanted, 1):
        before, row = row, [place]
        for column, other in enumerate(found, 1):
            row.append(min(before[column] + 1, row[-1] + 1, before[column - 1] + (word != other)))
    return row[-1]
