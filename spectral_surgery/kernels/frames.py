"""The symbols of a frame in one call: what a loading model, or a product with frames, does without Python in between.

It takes the frames that nearly all tensors have: with short states, and points of the lattice of one byte each.
`codec.frame_bytes` decodes all others, and says what is wrong with those that are damaged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels import BLOCK, SHORT, lanes, rans
from spectral_surgery.kernels.compile import kernel
from spectral_surgery.kernels.frame_parts import read_tables, unpack
from spectral_surgery.kernels.frame_plans import ABOUT_HALF, ABOUT_ZERO

Array = npt.NDArray[Any]

HEADER = 12  # bytes

_ZEROS, _INTEGERS, _LATTICE = range(3)  # kinds
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
def decode(data: Array, out: Array) -> bool:
    """Decode the symbols of a frame, or its codes where they are points of the lattice.

    Returns whether the frame is one that can be, and ends where it should; else numbers of any value are left.

    Args:
        data: [n] uint8, the frame.
        out: [r, I] int8, C-contiguous.
    """
    rows, columns = out.shape
    if data.size < HEADER or data[0] > _LATTICE:
        return False
    kind, low, count, length = data[0], int(data[2]), int(data[3]) - SHORT, number_at(data, 4)
    beyond = (low * out.size + 7) // 8 + int(data[1]) * number_at(data, 8)  # bytes of low bits and of the list
    if kind == _ZEROS:
        out[:] = 0
        return data.size == HEADER and data[3] == 0 and length == 0 and beyond == 0
    lattice = kind == _LATTICE
    if not 0 < count <= 64 or out.size == 0 or (lattice and beyond):
        return False
    frequencies = np.zeros((6 if lattice else 1, 256), np.int64)
    at = read_tables(data, HEADER, 2 if lattice else 1, ABOUT_HALF if low else ABOUT_ZERO, frequencies)
    whole, bits = _word_bytes(rows, columns) if lattice else (0, 0)
    states_at = at + whole + (bits * columns + 7) // 8
    stream_at = states_at + 4 * count
    if at < 0 or stream_at + 2 * length + beyond != data.size or (lattice and not _fits(frequencies)):
        return False
    states = np.empty(count, np.uint32)
    for lane in range(count):
        states[lane] = number_at(data, states_at + 4 * lane)
    table, begin, read, end = rans.decoding_table(frequencies), 0, 0, stream_at + 2 * length
    if count == lanes.LANES[0] or count == lanes.LANES[1]:
        begin, read = lanes.decode(data[at : at + whole], data[stream_at:end], states, table, out)
    if read > length:
        return False
    left, numbers = np.zeros(length - read + 1, np.uint16), _numbers(data, at, out.shape, lattice, begin)
    for word in range(read, length):
        left[word - read] = np.uint16(data[stream_at + 2 * word]) | np.uint16(data[stream_at + 2 * word + 1]) << 8
    taken = rans.decode(left, states.astype(np.uint64), table, numbers, out, lattice, begin)
    return taken == length - read


@kernel
def _numbers(data: Array, at: int, shape: Any, lattice: bool, begin: int) -> Array:
    """Words of the blocks from ``begin`` on, a multiple of 4 among the whole ones; of no length without a lattice."""
    if not lattice:
        return np.empty(0, np.uint8)
    whole, bits = _word_bytes(shape[0], shape[1])
    blocks = shape[0] // BLOCK * shape[1]
    out = np.empty(blocks - begin + (shape[1] if bits else 0), np.uint8)
    unpack(data, at + begin * 6 // 8, 6, out[: blocks - begin])
    if bits:
        unpack(data, at + whole, bits, out[blocks - begin :])
    return out
