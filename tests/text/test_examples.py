"""Texts from files of every kind, and what is held out of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectral_surgery.errors import ConfigError
from spectral_surgery.text.examples import Example, documents, read_examples, split_examples


def test_reading_examples(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text('a,b,score\nx,"y, z",1.5\np,q,2\n')
    assert read_examples(csv) == [Example(("x", "y, z"), 1.5), Example(("p", "q"), 2.0)]
    assert read_examples(csv, ("b", "score")) == [Example(("y, z",), 1.5), Example(("q",), 2.0)]
    csv.write_text("x,y,1.5\n")
    assert read_examples(csv, ("a", "b", "c")) == [Example(("x", "y"), 1.5)]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "x", "label": "good"}\n\n{"text": "y", "label": "bad"}\n')
    assert read_examples(lines) == [Example(("x",), "good"), Example(("y",), "bad")]
    assert read_examples(lines, ("text",)) == [Example(("x",)), Example(("y",))]


@pytest.mark.parametrize(
    ("name", "content", "columns", "match"),
    [
        ("a.txt", b"", (), "got an empty file"),
        ("a.txt", b"\xff\xfe\x00", (), "in UTF-8, got other bytes"),
        ("a.csv", b"x,y,1\nz\n", (), "row 2: expected 3 columns, got 1"),
        ("a.csv", b"x,y,1\n", ("a", "b"), "expected columns a, b, got x, y, 1"),
        ("a.jsonl", b"[1]\n", (), "got something else on line 1"),
        ("a.jsonl", b'{"txt": 1}\n', (), "line 1: expected text, got txt"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, columns: tuple[str, ...], match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        read_examples(tmp_path / name, columns)


def test_what_is_held_out_shares_no_document_with_the_rest() -> None:
    examples = [Example((str(number),)) for number in range(20)]
    parts = split_examples(examples, 0.25, 0.1)
    assert [len(part) for part in parts] == [13, 5, 2]
    assert (
        sorted((example for part in parts for example in part), key=lambda example: int(example.texts[0])) == examples
    )
    assert parts == split_examples(examples, 0.25, 0.1)  # the same in every run
    assert {example.texts[0] for example in parts[1]} != {"13", "14", "15", "16", "17"}  # files are often sorted


def test_a_single_document_is_cut_and_its_end_held_out() -> None:
    def cut(text: str, *fractions: float) -> list[list[str]]:
        return [[example.texts[0] for example in part] for part in split_examples([Example((text,))], *fractions)]

    assert cut("abcdefghij", 0.2) == [["abcdefgh"], ["ij"]]
    assert cut("abcdefghij", 0.2, 0.1) == [["abcdefg"], ["hi"], ["j"]]
    with pytest.raises(ConfigError, match=r"expected numbers above 0 with a sum below 1, got 0\.5, 0\.5"):
        cut("abc", 0.5, 0.5)
    with pytest.raises(ConfigError, match="text: expected more than 2 characters for 3 parts, got 2"):
        cut("ab", 0.1, 0.1)
    with pytest.raises(ConfigError, match="text: expected more than 2 documents for 3 parts, got 2"):
        split_examples([Example(("a",)), Example(("b",))], 0.1, 0.1)


def test_documents_are_texts_of_language_models_and_lines_of_others(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\\nb"}\n{"text": "c"}\n')
    assert documents(file, causal=True) == [Example(("a\nb",)), Example(("c",))]
    assert documents(file, causal=False) == [Example(("a",)), Example(("b",)), Example(("c",))]
