"""Word errors are the fewest edits, whatever the words."""

from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.text.word_errors import word_edits, words_of

WORDS = st.lists(st.sampled_from("abc"), max_size=6).map(tuple)


def fewest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """By the definition: the last word of either is left out, put in, or one is replaced by the other."""

    @cache
    def of(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


@given(WORDS, WORDS)
def test_edits_are_the_fewest(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    assert word_edits(a, b) == fewest(a, b) == word_edits(b, a)
    assert word_edits(a, a) == 0


def test_words_differ_by_their_letters_alone() -> None:
    assert words_of(" It's 10 o'clock, Zoë.") == ["it's", "10", "o'clock", "zoë"]
    assert word_edits(words_of("a small red house"), words_of("A small, read mouse house!")) == 2
