"""Tables of frequencies: every symbol that occurs has one, they fit, and come back from bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.symbol_table import (
    ABOUT_HALF,
    ABOUT_ZERO,
    NONE,
    SLOTS,
    SymbolTable,
    fitted_table,
    with_parity,
)
from spectral_surgery.errors import CheckpointError
from spectral_surgery.kernels.frame_parts import read_tables
from spectral_surgery.kernels.frame_plans import fit

COUNTS = st.dictionaries(st.integers(-127, 127), st.integers(1, 1 << 40), max_size=255)


def counts_of(occurring: dict[int, int]) -> Any:
    counts = np.zeros(256, np.int64)
    for symbol, count in occurring.items():
        counts[symbol + 128] = count
    return counts


def rows_read(data: bytes, symmetry: int) -> tuple[Any, int]:
    """What kernels read of a table: [6, 256], of which rows 2 and 4 are those of one parity, and where it ends."""
    rows, seen = np.zeros((6, 256), np.int64), np.frombuffer(data, np.uint8)
    return rows, read_tables(seen, 0, 1, symmetry, rows)


@given(COUNTS, st.sampled_from([ABOUT_ZERO, ABOUT_HALF]), st.booleans())
def test_every_symbol_that_occurs_has_a_frequency(occurring: dict[int, int], symmetry: int, mirror: bool) -> None:
    if mirror:
        occurring |= {(-k if symmetry == ABOUT_ZERO else -1 - k): count for k, count in occurring.items()}
    counts = counts_of(occurring)
    table = fitted_table(counts, symmetry)
    frequencies = table.by_symbol()
    assert (frequencies[counts > 0] > 0).all()
    assert 0 < frequencies.sum() <= SLOTS
    assert frequencies.max() < SLOTS
    if table.symmetry == ABOUT_ZERO:
        np.testing.assert_array_equal(frequencies[1:], frequencies[:0:-1])
    elif table.symmetry == ABOUT_HALF:
        np.testing.assert_array_equal(frequencies, frequencies[::-1])
    assert SymbolTable.from_bytes(memoryview(table.to_bytes() + b"more"), symmetry) == (table, len(table.to_bytes()))
    rows, end = rows_read(table.to_bytes(), symmetry)
    assert end == len(table.to_bytes())
    np.testing.assert_array_equal(rows[0], frequencies)
    np.testing.assert_array_equal(rows[[2, 4]], with_parity(frequencies))
    for parity, known in enumerate(with_parity(frequencies)):
        of_parity = np.arange(256) % 2 == parity
        assert ((known > 0) == (frequencies > 0) * of_parity).all()
        assert known.sum() in (0, SLOTS - 1, SLOTS)
        assert known.max() < SLOTS


def test_frequencies_are_as_the_counts() -> None:
    counts = counts_of({0: 1000, 1: 480, -1: 520, 2: 30, -2: 18, 5: 1})
    table = fitted_table(counts, ABOUT_ZERO)
    assert (table.symmetry, table.entries) == (ABOUT_ZERO, (2000, 999, 48, 0, 0, 1)), "4097 when rounded"
    cost = -(counts[counts > 0] * np.log2(table.by_symbol()[counts > 0] / SLOTS)).sum()
    assert fit(counts, ABOUT_ZERO, np.zeros(256, np.int64))[3] == pytest.approx(cost + 8 * (1 + 2 + 2 + 4))


def test_symmetry_is_left_where_it_costs_more() -> None:
    few, many = {0: 10, 1: 3}, {0: 1000, 1: 300}
    assert fitted_table(counts_of(few), ABOUT_ZERO).symmetry == ABOUT_ZERO
    table = fitted_table(counts_of(many), ABOUT_ZERO)
    assert (table.symmetry, table.first) == (NONE, 0)
    assert table.to_bytes()[:3] == bytes([0, 128, 2])
    assert sum(table.entries) == SLOTS
    alone = fitted_table(counts_of({-128 + 5: 10000}), ABOUT_HALF)
    assert (alone.symmetry, alone.first, alone.entries) == (NONE, -123, (SLOTS - 1,))
    every = SymbolTable(NONE, (1,) * 255, -128)
    assert SymbolTable.from_bytes(memoryview(every.to_bytes()), ABOUT_ZERO)[0] == every


def test_parity_in_integers() -> None:
    """As docs/format.md has it: rounded down, and the least of the most frequent symbols takes the rest."""
    table = SymbolTable(ABOUT_ZERO, (1000, 700, 400, 3)).by_symbol()
    even, odd = with_parity(table)
    assert {k - 128: int(f) for k, f in enumerate(even) if f} == {-2: 910, 0: 2276, 2: 910}
    assert {k - 128: int(f) for k, f in enumerate(odd) if f} == {-3: 8, -1: 2041, 1: 2039, 3: 8}
    alone, none = with_parity(SymbolTable(ABOUT_ZERO, (4095,)).by_symbol())
    assert alone[128] == SLOTS - 1
    assert not none.any()


@pytest.mark.parametrize(
    ("data", "symmetry", "text"),
    [
        (b"", ABOUT_ZERO, "a table of 0 entries"),
        (b"\0", ABOUT_ZERO, "a table of 0 entries"),
        (b"\0\x80", ABOUT_ZERO, "a table of 0 entries"),
        (b"\0\x80\0", ABOUT_ZERO, "a table of 0 entries"),
        (b"\0\x80\x01", ABOUT_ZERO, "a table ends early"),
        (b"\x01", ABOUT_ZERO, "a table ends early"),
        (b"\x01\x90", ABOUT_ZERO, "a table ends early"),
        (b"\x02\x05", ABOUT_HALF, "a table ends early"),
        (b"\x01\x90\x00", ABOUT_ZERO, "a table of 1 entries does not add up to 4096"),
        (b"\x01\x8f\xff", ABOUT_HALF, "a table of 1 entries does not add up to 4096"),
        (b"\x02\x8f\xff\x01", ABOUT_ZERO, "a table of 2 entries does not"),
        (bytes([129, *[1] * 129]), ABOUT_ZERO, "a table of 129 entries"),
        (bytes([255, *[255] * 510]), ABOUT_ZERO, "a table of 255 entries"),
        (bytes([0, 255, 2, 1, 1]), ABOUT_ZERO, "a table of 2 entries"),
        (bytes([0, 0, 2, 143, 255, 2]), ABOUT_ZERO, "a table of 2 entries"),
    ],
)
def test_damaged_tables(data: bytes, symmetry: int, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        SymbolTable.from_bytes(memoryview(data), symmetry)
    assert rows_read(data, symmetry)[1] == -1
