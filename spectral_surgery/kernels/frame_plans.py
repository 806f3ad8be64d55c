"""The tables of a frame, and the bits that they and its symbols take.

The arithmetic is short, and for a small frame the calls of numpy would take a hundred times as long.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels.compile import inlined, kernel
from spectral_surgery.kernels.rans import SLOTS

Array = npt.NDArray[Any]

ABOUT_ZERO, ABOUT_HALF, NONE = range(3)  # symmetries of a table


@kernel
def _entries(counts: Array, symmetry: int, first: int, size: int, out: Array) -> int:
    """Frequencies in proportion to counts, or to the means of those of two symbols; none is zero but that of no count.

    Args:
        counts: [256] int64, by symbol + 128.
        first: symbol of the first entry.
        size: entries at most.
        out: [256] int64, written.

    Returns:
        How many entries there are.
    """
    total, length = 0, 1
    for k in range(size):
        if symmetry == NONE:
            out[k] = 2 * counts[128 + first + k]
        else:
            out[k] = counts[128 + k] + counts[127 - k if symmetry == ABOUT_HALF else 128 - k]
        total += _times(symmetry, k) * out[k]
        length = k + 1 if out[k] else length
    scale, over = SLOTS / max(total / 2, 1.0), -SLOTS
    for k in range(length):
        least = 1 if out[k] else 0
        out[k] = min(max(np.int64(math.floor(out[k] / 2 * scale + 0.5)), least), SLOTS - 1)
        over += _times(symmetry, k) * out[k]
    while over > 0:
        largest, times = _largest(out, length, symmetry, 1)
        fewer = max(1, min(over // times, out[largest] // 2))
        out[largest] -= fewer
        over -= fewer * times
    largest, times = _largest(out, length, symmetry, 0)
    out[largest] = max(min(out[largest] + -over // times, SLOTS - 1), 1)
    return length


@inlined
def _times(symmetry: int, k: int) -> int:
    """How many symbols an entry is for."""
    return 1 if symmetry == NONE or (symmetry == ABOUT_ZERO and k == 0) else 2


@inlined
def _largest(entries: Array, length: int, symmetry: int, above: int) -> tuple[int, int]:
    """Which entry takes the most slots, of those above a number, and how many symbols it is for."""
    largest, most = 0, 0
    for k in range(length):
        if entries[k] > above and _times(symmetry, k) * entries[k] > most:
            largest, most = k, _times(symmetry, k) * entries[k]
    return largest, _times(symmetry, largest)


@kernel
def _bits(counts: Array, symmetry: int, first: int, size: int, entries: Array) -> float:
    """What symbols that occur so often take, and the table, as `codec.symbol_table` writes it."""
    coded, table = 0.0, 3 if symmetry == NONE else 1
    for k in range(size):
        table += 1 if entries[k] < 128 else 2
    for number in range(256):
        if counts[number]:
            place = number - 128 - first
            if place < 0:
                place = -place if symmetry == ABOUT_ZERO else -1 - place
            coded -= counts[number] * math.log2(entries[place] / SLOTS)
    return coded + 8 * table


@kernel
def fit(counts: Array, symmetry: int, entries: Array) -> tuple[int, int, int, float]:
    """The table for symbols that occur so often, with or without symmetry, whichever takes fewer bits.

    Args:
        counts: [256] int64, by symbol + 128.
        symmetry: ABOUT_ZERO or ABOUT_HALF.
        entries: [256] int64, written.

    Returns:
        The symmetry, the symbol of the first entry where there is none, how many entries there are, and the bits.
    """
    first, last, other = 127, -128, np.zeros(256, np.int64)
    for number in range(256):
        if counts[number]:
            first, last = min(first, number - 128), number - 128
    if last < first:
        first, last = 0, 0
    size = _entries(counts, symmetry, 0, 128, entries)
    free = _entries(counts, NONE, first, last + 1 - first, other)
    bits, free_bits = _bits(counts, symmetry, 0, size, entries), _bits(counts, NONE, first, free, other)
    if bits <= free_bits:
        return symmetry, 0, size, bits
    for k in range(free):
        entries[k] = other[k]
    return NONE, first, free, free_bits


@kernel
def frame_tables(counts: Array, lattice: bool, low: int, last_rows: int, entries: Array, tables: Array) -> float:
    """The tables of a frame, and the bits that they and its symbols take.

    Args:
        counts: [2, 256] int64, by c and by symbol + 128.
        lattice: whether symbols are the m of ``2 m + c``, with a table for each c.
        low: bits that are left out of a symbol.
        last_rows: numbers in the last rows of whole blocks: without low bits, their parity is known.
        entries: [2, 256] int64, written: of the table of each c.
        tables: [2, 3] int64, written: symmetry, first symbol, and how many entries there are.
    """
    total = 0.0
    for c in range(2 if lattice else 1):
        tables[c, 0], tables[c, 1], tables[c, 2], bits = fit(
            counts[c], ABOUT_HALF if low or c else ABOUT_ZERO, entries[c]
        )
        total += bits
    return total - last_rows * _parity_bits(counts) if lattice and not low else total


@kernel
def _parity_bits(counts: Array) -> float:
    """Entropy of whether a symbol is odd, given c: what the last row of a block takes less. Counts are [2, 256]."""
    bits, total = 0.0, 0
    for c in range(2):
        even, odd = 0, 0
        for pair in range(128):
            even, odd = even + counts[c, 2 * pair], odd + counts[c, 2 * pair + 1]
        total += even + odd
        bits -= even * math.log2(even / (even + odd)) if even else 0.0
        bits -= odd * math.log2(odd / (even + odd)) if odd else 0.0
    return bits / total
