"""A frame to its codes in one call: what a loading model, or a product with frames, does without Python in between.

It takes the frames that nearly all tensors have: with short states, and of codes of one byte without a list.
`codec.frame_bytes` decodes all others, and says what is wrong with those that are damaged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from spectral_surgery.kernels import BLOCK, SHORT, lanes, rans
from spectral_surgery.kernels.compile import kernel
from spectral_surgery.kernels.frame_parts import read_tables, unpack
from spectral_surgery.kernels.frame_plans import ABOUT_HALF, ABOUT_ZERO
from spectral_surgery.kernels.threads import pointer_to

Array = npt.NDArray[Any]

HEADER = 12  # bytes
NEITHER, CODES, SYMBOLS = range(3)  # what `decode` gives

_ZEROS, _INTEGERS, _LATTICE = range(3)  # kinds
_MOST = 127  # of a level
_SMALLEST, _LARGEST = -64, 63  # symbols of the lattice whose codes are of one byte


@kernel
def number_at(data: Array, at: int) -> int:
    """Four bytes, the lowest first."""
    return int(data[at]) | int(data[at + 1]) << 8 | int(data[at + 2]) << 16 | int(data[at + 3]) << 24


@kernel
def _word_bytes(rows: int, columns: int) -> tuple[int, int]:
    """Bytes of the words of whole blocks, and bits of a word of those that are left."""
    left, bits = rows % BLOCK, 0
    while left and 1 << bits < left:
        bits += 1
    return (rows // BLOCK * columns * 6 + 7) // 8, bits + 1 if left else 0


@kernel
def _fits(frequencies: Array) -> bool:
    """Whether all symbols of the lattice have codes of one byte."""
    for context in range(len(frequencies)):
        for symbol in range(256):
            if frequencies[context, symbol] and not _SMALLEST <= symbol - 128 <= _LARGEST:
                return False
    return True


@kernel
def decode(address: int, size: int, out: Array) -> int:
    """Decode a frame.

    Returns `CODES` where it has codes of one byte and no list; `SYMBOLS` for symbols m of others, ``2 m + c`` of the
    lattice, without their low bits and what the list has; `NEITHER` where symbols are not of one byte, or do not end as
    they should.

    Args:
        address: of the frame.
        size: its bytes.
        out: [r, I] int8, C-contiguous; numbers of any value for `NEITHER`.
    """
    data, (rows, columns) = carray(pointer_to(address), (size,), np.uint8), out.shape
    if size < HEADER or data[0] > _LATTICE or (data[1] == 1 and data[2] > 7):
        return NEITHER
    low, count, length = int(data[2]), int(data[3]) - SHORT, number_at(data, 4)
    beyond = (low * out.size + 7) // 8 + int(data[1]) * number_at(data, 8)  # bytes of low bits and of the list
    if data[0] == _ZEROS:
        out[:] = 0
        return CODES if size == HEADER and data[1] == 1 and data[3] == 0 and length == 0 and beyond == 0 else NEITHER
    lattice = data[0] == _LATTICE
    parity = lattice and low == 0
    frequencies = np.zeros((6 if parity else 2 if lattice else 1, 256), np.int64)
    at = read_tables(data, HEADER, 2 if lattice else 1, ABOUT_HALF if low else ABOUT_ZERO, frequencies)
    whole, bits = _word_bytes(rows, columns) if lattice else (0, 0)
    states_at = at + whole + (bits * columns + 7) // 8
    end = states_at + 4 * count + 2 * length
    if at < 0 or not 0 < count <= 64 or out.size == 0 or end + beyond != size or (lattice and not _fits(frequencies)):
        return NEITHER
    states = np.empty(count, np.uint32)
    for lane in range(count):
        states[lane] = number_at(data, states_at + 4 * lane)
    table, begin, read = rans.decoding_table(frequencies), 0, 0
    if (count == lanes.LANES[0] or count == lanes.LANES[1]) and parity == lattice:
        begin, read = lanes.decode(data[at : at + whole], data[states_at + 4 * count : end], states, table, out)
    left = np.zeros(max(length - read, 0) + 1, np.uint16)
    for word in range(length - read):
        place = end - 2 * (length - read - word)
        left[word] = np.uint16(data[place]) | np.uint16(data[place + 1]) << 8
    numbers = _numbers(data, at, rows, columns, begin) if lattice else np.empty(0, np.uint8)
    if rans.decode(left, states.astype(np.uint64), table, numbers, out, parity, begin) != length - read:
        return NEITHER
    codes = data[1] == 1 and number_at(data, 8) == 0
    if codes and low:
        _add_low_bits(data, size - (low * out.size + 7) // 8, low, lattice, out)
    return CODES if codes else SYMBOLS


@kernel
def _add_low_bits(data: Array, at: int, low: int, lattice: bool, out: Array) -> None:
    """Symbols to codes, in place; of one byte, where fewer than eight bits are left out."""
    flat, bits = out.reshape(-1), np.empty(out.size, np.uint8)
    unpack(data, at, low, bits)
    for place in range(flat.size):
        if lattice:
            flat[place] = 2 * ((flat[place] >> 1 << low) + bits[place]) + (flat[place] & 1)
        else:
            flat[place] = (flat[place] << low) + bits[place]


@kernel
def _numbers(data: Array, at: int, rows: int, columns: int, begin: int) -> Array:
    """Words of the blocks from ``begin`` on, a multiple of 4 among the whole ones."""
    whole, bits = _word_bytes(rows, columns)
    blocks = rows // BLOCK * columns
    out = np.empty(blocks - begin + (columns if bits else 0), np.uint8)
    unpack(data, at + begin * 6 // 8, 6, out[: blocks - begin])
    if bits:
        unpack(data, at + whole, bits, out[blocks - begin :])
    return out


@kernel
def to_levels(codes: Array, parts: int, shift: int) -> bool:
    """Codes q to levels ``parts * q + shift * sign(q)``, in place; whether int8 holds them: else nothing is changed.

    Args:
        codes: [n] int8, which `decode` gave.
        parts: 1 to 127.
        shift: in those parts.
    """
    if parts == 1 and shift == 0:
        return True
    low, high = 0, 0
    for place in range(codes.size):
        low, high = min(low, codes[place]), max(high, codes[place])
    if parts * max(-low, high) + max(shift, 0) > _MOST:
        return False
    for place in range(codes.size):
        code = codes[place]
        codes[place] = parts * code + (shift if code > 0 else -shift if code < 0 else 0)
    return True
