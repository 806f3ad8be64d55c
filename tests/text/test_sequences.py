"""A stream of tokens is cut into sequences, and no more text is read than these need."""

from __future__ import annotations

import pytest

from spectral_surgery.text.sequences import cut_stream


class Letters:
    """A tokenizer that keeps what it was asked for."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
        assert not verbose
        self.texts.append(text)
        return {"input_ids": list(map(ord, text))}


TEXTS = ["abc", "", "defg", "hi", "jklm"]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 13, 40])
def test_some_sequences_are_the_first_of_all(length: int, ended: bool) -> None:
    whole = cut_stream(Letters(), TEXTS, length, ended=ended)
    tokens = 13 + 5 * ended
    assert [len(sequence) for sequence in whole] == [min(length, tokens)] * max(1, tokens // length)
    for samples in range(1, 8):
        assert cut_stream(Letters(), TEXTS, length, ended=ended, samples=samples) == whole[:samples]


def test_text_beyond_the_last_sequence_is_not_read() -> None:
    letters = Letters()
    assert cut_stream(letters, TEXTS, 3, samples=2) == [[97, 98, 99], [100, 101, 102]]
    assert letters.texts == TEXTS[:3]
    assert cut_stream(letters, [], 3, samples=2) == []
