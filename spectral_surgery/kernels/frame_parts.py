"""Parts of a frame from its bytes: for a small frame the calls of numpy would take longer than all of its decoding."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from spectral_surgery.kernels.compile import kernel
from spectral_surgery.kernels.rans import SLOTS

Array = npt.NDArray[Any]

_ABOUT_HALF = 1  # symmetry of a table


@kernel
def read_tables(data: Array, at: int, tables: int, symmetry: int, out: Array) -> int:
    """The tables of a frame, as `codec.symbol_table` writes them.

    Args:
        data: [n] uint8, the frame.
        at: where they begin.
        tables: how many there are.
        symmetry: of the first one; others are about one half.
        out: [contexts, 256] int64, zeros; frequencies by symbol + 128 are written to the first rows, and to row
            ``2 + c + 2 * parity`` those of table c and of one parity, where there are such rows.

    Returns:
        Where they end; -1 where they are damaged.
    """
    for number in range(tables):
        first, free, total = 0, False, 0
        if at + 2 < data.size and data[at] == 0:
            free, first, at = True, int(data[at + 1]) - 128, at + 2
        size = int(data[at]) if at < data.size else 0
        if size < 1 or size > (128 - first if free else 128):
            return -1
        at += 1
        for k in range(size):
            wide = 1 if at < data.size and data[at] >= 128 else 0
            if at + wide >= data.size:
                return -1
            entry = ((int(data[at]) & 127) << 8 | int(data[at + 1])) if wide else int(data[at])
            if entry >= SLOTS:
                return -1
            at += 1 + wide
            out[number, 128 + first + k] = entry
            mirrored = 128 + first + k if free else (127 - k if number or symmetry == _ABOUT_HALF else 128 - k)
            out[number, mirrored] = entry
        for symbol in range(256):
            total += out[number, symbol]
        if total > SLOTS:
            return -1
    for row in range(2, len(out)):
        _of_parity(out, (row - 2) & 1, (row - 2) >> 1, row)
    return at


@kernel
def _of_parity(out: Array, c: int, parity: int, row: int) -> None:
    """As `codec.symbol_table.with_parity`, for one parity."""
    total = 0
    for symbol in range(parity, 256, 2):
        total += out[c, symbol]
    largest, left = parity, SLOTS
    for symbol in range(parity, 256 if total else 0, 2):
        out[row, symbol] = out[c, symbol] * SLOTS // total
        left -= out[row, symbol]
        largest = symbol if out[row, symbol] > out[row, largest] else largest
    if total:
        out[row, largest] = min(out[row, largest] + left, SLOTS - 1)


@kernel
def unpack(data: Array, at: int, bits: int, out: Array) -> None:
    """Numbers of 1 to 8 bits that lie one after the other, the lowest bit first: to [n] uint8."""
    for place in range(out.size):
        byte, shift = at + place * bits // 8, place * bits % 8
        number = int(data[byte])
        if shift + bits > 8:
            number |= int(data[byte + 1]) << 8
        out[place] = (number >> shift) & ((1 << bits) - 1)
