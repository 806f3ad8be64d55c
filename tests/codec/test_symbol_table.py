"""Tables of frequencies: every symbol that occurs has one, they fit, and come back from bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.symbol_table import SLOTS, SymbolTable, fitted_table, with_parity
from spectral_surgery.errors import CheckpointError

COUNTS = st.dictionaries(st.integers(-127, 127), st.integers(1, 1 << 40), max_size=255)


def counts_of(occurring: dict[int, int]) -> Any:
    counts = np.zeros(256, np.int64)
    for symbol, count in occurring.items():
        counts[symbol + 128] = count
    return counts


@given(COUNTS, st.booleans())
def test_every_symbol_that_occurs_has_a_frequency(occurring: dict[int, int], about_zero: bool) -> None:
    counts = counts_of(occurring)
    table = fitted_table(counts, about_zero)
    frequencies = table.by_symbol()
    assert (frequencies[counts > 0] > 0).all()
    assert 0 < frequencies.sum() <= SLOTS
    assert frequencies.max() < SLOTS
    mirrored = frequencies[:0:-1] if about_zero else frequencies[::-1]
    np.testing.assert_array_equal(frequencies[about_zero:], mirrored)
    assert SymbolTable.from_bytes(memoryview(table.to_bytes() + b"more"), about_zero) == (table, len(table.to_bytes()))
    for parity, known in enumerate(with_parity(frequencies)):
        of_parity = np.arange(256) % 2 == parity
        assert ((known > 0) == (frequencies > 0) * of_parity).all()
        assert known.sum() in (0, SLOTS - 1, SLOTS)
        assert known.max() < SLOTS


def test_frequencies_are_as_the_counts() -> None:
    counts = counts_of({0: 1000, 1: 480, -1: 520, 2: 30, -2: 18, 5: 1})
    table = fitted_table(counts, True)
    assert table.entries == (2000, 999, 48, 0, 0, 1), "4097 when rounded, hence one less twice, and one more"
    cost = -(counts[counts > 0] * np.log2(table.by_symbol()[counts > 0] / SLOTS)).sum()
    assert table.bits(counts) == pytest.approx(cost + 8 * (1 + 3 * 2 - 1 + 3))


def test_parity_in_integers() -> None:
    """As docs/format.md has it: rounded down, and the least of the most frequent symbols takes the rest."""
    table = SymbolTable(True, (1000, 700, 400, 3)).by_symbol()
    even, odd = with_parity(table)
    assert {k - 128: int(f) for k, f in enumerate(even) if f} == {-2: 910, 0: 2276, 2: 910}
    assert {k - 128: int(f) for k, f in enumerate(odd) if f} == {-3: 8, -1: 2041, 1: 2039, 3: 8}
    alone, none = with_parity(SymbolTable(True, (4095,)).by_symbol())
    assert alone[128] == SLOTS - 1
    assert not none.any()


@pytest.mark.parametrize(
    ("data", "about_zero", "text"),
    [
        (b"", True, "a table of 0 entries"),
        (b"\0", True, "a table of 0 entries"),
        (b"\x01", True, "a table ends early"),
        (b"\x01\x90", True, "a table ends early"),
        (b"\x02\x05", False, "a table ends early"),
        (b"\x01\x90\x00", True, "a table of 1 entries adds up to 4096"),
        (b"\x01\x8f\xff", False, "a table of 1 entries adds up to 8190; expected 4096 at most"),
        (b"\x02\x8f\xff\x01", True, "a table of 2 entries adds up to 4097"),
        (bytes([129, *[1] * 129]), True, "a table of 129 entries"),
        (bytes([255, *[255] * 510]), True, "a table of 255 entries"),
    ],
)
def test_damaged_tables(data: bytes, about_zero: bool, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        SymbolTable.from_bytes(memoryview(data), about_zero)
