"""An entropy coder at the entropy: range asymmetric numeral systems, on blocks of 32 rows of one column.

A state x in [2^16, 2^32) stands for all that is to come. To decode a symbol of frequency f and start b, of 4096 slots,
``slot = x mod 4096`` finds it, and ``x = f * (x // 4096) + slot - b``. Then a state below 2^16 takes in 16 bits more.
Several lanes, each with a state, take blocks in turn, so that a processor always has something to do; they share one
stream of words. Source: J. Duda, arXiv 1311.2540; lanes in one stream: F. Giesen, arXiv 1402.3392.

Long states are of an earlier form of frames, which is read and no longer written: in [2^31, 2^63), with 32 bits more
after two symbols.

A symbol is coded with the table of its context. With words of the lattice (see `lattice`) this is the bit c of its
position, and in row 31 also the parity of the symbols before it: contexts are c, and 2 + c + 2 * parity in row 31.

`decode` is plain; most of a large frame is decoded by `lanes` instead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]

from spectral_surgery.kernels import BLOCK
from spectral_surgery.kernels.compile import inlined, intrinsic, kernel
from spectral_surgery.kernels.lattice import MASKS

PRECISION = 12
SLOTS = 1 << PRECISION
FLOOR = 1 << 16  # the least state
LONG_FLOOR = 1 << 31  # the least long state
LARGEST = 125  # magnitude of a symbol that stands for itself; 126 and 127 stand for all larger ones

Ints = npt.NDArray[Any]

_P, _ONE = np.uint64(PRECISION), np.uint64(1)
_SLOT, _SHIFT_START, _SHIFT_FREQUENCY = np.uint64(SLOTS - 1), np.uint64(8), np.uint64(20)
_PARITY = np.uint64(2 * SLOTS)


@kernel
def count_symbols(codes: Ints, lattice: bool, low: int, counts: Ints) -> int:
    """How often each symbol of codes occurs, without their low bits; returns how many are for the list.

    Args:
        codes: [r, I] int8 or int32, C-contiguous.
        lattice: whether codes are ``2 m + c``, and symbols are those of m.
        low: bits that are left out.
        counts: [2, 256] int64, added to: by c, which is zero without a lattice, and symbol + 128.
    """
    flat, beyond = codes.reshape(-1), 0
    parts = np.zeros((4, 512), np.int64)  # in turn: the next addition need not wait for the last one
    for place in range(flat.size):
        code = np.int32(flat[place])
        symbol, far = _symbol(code, lattice, low)
        parts[place & 3, 256 * (code & 1 if lattice else 0) + symbol + 128] += 1
        beyond += far
    for which in range(512):
        for part in range(4):
            counts[which // 256, which % 256] += parts[part, which]
    return beyond


@inlined
def _symbol(code: Any, lattice: bool, low: int) -> tuple[int, int]:
    """The symbol of a code, and one where it is beyond 125 in magnitude: then 126 or 127, odd or even as it is."""
    symbol = code >> (low + (1 if lattice else 0))
    far = 1 if abs(symbol) > LARGEST else 0
    near = LARGEST + 1 + (symbol & 1)
    return (near if symbol > 0 else -near) if far else symbol, far


@kernel
def decoding_table(frequencies: Ints) -> Ints:
    """Slots of every context: [contexts, 256] frequencies, by symbol + 128, to [contexts * 4096] uint32.

    A slot holds the frequency (12 bits), its place within the symbol (12 bits) and the symbol (8 bits). Slots that no
    symbol has are zero.
    """
    table = np.zeros(len(frequencies) * SLOTS, np.uint32)
    for context in range(len(frequencies)):
        at = context * SLOTS
        for number in range(256):
            frequency = np.uint32(frequencies[context, number])
            entry = frequency << np.uint32(20) | np.uint32((number - 128) & 255)
            for place in range(frequency):
                table[at] = entry | np.uint32(place) << np.uint32(8)
                at += 1
    return table


@kernel
def _decoded(x: np.uint64, context: np.uint64, table: Ints) -> tuple[np.uint64, np.uint64]:
    slot = np.uint64(table[context | (x & _SLOT)])
    return slot, (slot >> _SHIFT_FREQUENCY) * (x >> _P) + ((slot >> _SHIFT_START) & _SLOT)


@kernel
def _level(slot: np.uint64, context: np.uint64, double: np.int32) -> np.int32:
    value = np.int32(np.int8(slot & np.uint64(255)))
    return (value << double) + np.int32((context >> _P) & np.uint64(double))


@inlined
def _context(bits: Any, odd: Any, known: bool) -> Any:
    """4096 times the context of a symbol: from bit c, and the parity of the symbols before where it is known."""
    context = bits & np.uint64(SLOTS)
    return context | _PARITY + ((odd & _ONE) << np.uint64(PRECISION + 1)) if known else context


@kernel
def decode(stream: Ints, states: Ints, table: Ints, words: Ints, out: Ints, parity: bool, begin: int) -> int:
    """Decode a matrix of symbols.

    Returns how many words of the stream were read, or -1 where the states do not end where they began.

    Args:
        stream: [n + 1] uint16, what is left of it and one spare; uint32 for long states.
        states: [lanes] uint64, not changed.
        table: from `decoding_table`.
        words: [blocks] uint8, the words of the lattice of the blocks from ``begin`` on; of no length for one context.
        out: [O, I] int8, int16 or int32: ``2 m + c`` for a symbol m with words, and m without.
        parity: whether row 31 has the contexts of parity.
        begin: whole blocks that have been decoded, a multiple of the lanes.
    """
    rows, columns = out.shape
    lanes, long = states.size, stream.itemsize == 4
    turn, more, floor = 2 if long else 1, np.uint64(32 if long else 16), np.uint64(LONG_FLOOR if long else FLOOR)
    flat = out.reshape(-1)
    state, mask, odd = states.copy(), np.zeros(lanes, np.uint64), np.zeros(lanes, np.uint64)
    place = np.zeros(lanes, np.int64)
    twice, last, read = np.int32(1 if words.size else 0), np.uint64(stream.size - 1), np.uint64(0)
    for part in range(2):  # whole blocks, then those of the rows that are left
        height = BLOCK if part == 0 else rows % BLOCK
        first = 0 if part == 0 else rows // BLOCK * columns
        blocks = rows // BLOCK * columns if part == 0 else (columns if height else 0)
        for start in range(begin if part == 0 else 0, blocks, lanes):
            count = min(lanes, blocks - start)
            for lane in range(count):
                block = first + start + lane
                place[lane] = block // columns * BLOCK * columns + block % columns
                mask[lane] = np.uint64(MASKS[words[block - begin]]) << _P if words.size else np.uint64(0)
                odd[lane] = np.uint64(0)
            for row in range(0, height, turn):
                for lane in range(count):
                    x, bits, at = state[lane], mask[lane], place[lane]
                    context = _context(bits, odd[lane], parity and row == BLOCK - 1)
                    slot, x = _decoded(x, context, table)
                    flat[at] = _level(slot, context, twice)
                    odd[lane] ^= slot
                    if long and row + 1 < height:
                        context = _context(bits >> _ONE, odd[lane], parity and row == BLOCK - 2)
                        slot, x = _decoded(x, context, table)
                        flat[at + columns] = _level(slot, context, twice)
                        odd[lane] ^= slot
                    mask[lane], place[lane] = bits >> np.uint64(turn), at + turn * columns
                    small = np.uint64(x < floor)  # without a branch, which would be foretold wrongly
                    state[lane] = (x << more * small) | np.uint64(stream[min(read, last)]) * small
                    read += small
    for lane in range(lanes):
        if state[lane] != floor:
            return -1
    return int(read)


@intrinsic
def _high(_typing: Any, left: Any, right: Any) -> Any:
    """The upper 64 bits of the product of two uint64."""

    def generate(_context: Any, build: Any, _signature: Any, values: Any) -> Any:
        wide = ir.IntType(128)
        product = build.mul(*(build.zext(value, wide) for value in values))
        return build.trunc(build.lshr(product, wide(64)), ir.IntType(64))

    return left(left, right), generate


@cache
def reciprocals() -> npt.NDArray[np.uint64]:
    """[4096, 2]: r and s so that ``x // f == (x * r >> 64) >> s`` for x below 2^63, by f from 2 on; 0 and 1 have none.

    R. Alverson, Integer division using reciprocals, 1991: r is ``2^(63 + b) / f``, rounded up, f at most 2^b.
    """
    out = np.zeros((SLOTS, 2), np.uint64)
    for f in range(2, SLOTS):
        b = (f - 1).bit_length()
        out[f] = ((1 << 63 + b) + f - 1) // f, b - 1
    return out


@inlined
def _encoded(x: Any, at: Any, tables: Ints) -> Any:
    """The state with one symbol more, ``x // f * 4096 + x % f + start``, for row ``at`` of `_encoding_tables`."""
    quotient = _high(x, tables[at, 1]) >> tables[at, 2]
    return x + tables[at, 3] + quotient * tables[at, 4]


def _encoding_tables(frequencies: Ints) -> npt.NDArray[np.uint64]:
    """[contexts * 256, 5]: the frequency f, its reciprocal and the shift, the start, and 4096 - f.

    Where f is one, a reciprocal of 2^64 - 1 gives the quotient ``x - 1``, and the start has 4095 more for it.
    """
    out = np.zeros((frequencies.size, 5), np.uint64)
    f = frequencies.reshape(-1)
    out[:, 0], out[:, 1:3] = f, reciprocals()[f]
    out[:, 3] = (np.cumsum(frequencies, axis=1) - frequencies).reshape(-1)
    out[:, 4] = SLOTS - f
    out[f == 1, 1] = (1 << 64) - 1
    out[f == 1, 3] += np.uint64(SLOTS - 1)
    return out


@inlined
def _find_rows(codes: Ints, low: int, parity: bool, place: Ints, mask: Ints, height: int, out: Ints) -> None:
    """Which row of `_encoding_tables` each symbol of some blocks has: [height, lanes] uint32, from the codes.

    Args:
        place: [lanes] where blocks begin in the codes.
        mask: [lanes] uint32, bits c of blocks; of no length without a lattice.
    """
    columns, flat, lattice = codes.shape[1], codes.reshape(-1), mask.size > 0
    odd = np.zeros(place.size, np.int32)
    for row in range(height):
        for lane in range(place.size):
            symbol, _ = _symbol(np.int32(flat[place[lane] + np.uint64(row * columns)]), lattice, low)
            context = np.int32(mask[lane] >> np.uint32(row) & np.uint32(1)) if lattice else np.int32(0)
            if parity and row == BLOCK - 1:
                context += np.int32(2) + np.int32(2) * (odd[lane] & np.int32(1))
            out[row, lane] = np.uint32(256 * context + symbol + 128)
            odd[lane] ^= symbol


@kernel
def _encode(codes: Ints, words: Ints, low: int, tables: Ints, parity: bool, states: Ints, stream: Ints) -> int:
    """Encode backwards, from the end of ``stream``. Returns the first word; -1 where a symbol has no frequency."""
    rows, columns = codes.shape
    lanes = states.size
    rows_of = np.empty((BLOCK, lanes), np.uint32)
    place, mask = np.empty(lanes, np.uint64), np.empty(lanes if words.size else 0, np.uint32)
    at, missing = np.uint64(stream.size - 1), False
    for part in range(1, -1, -1):
        height = BLOCK if part == 0 else rows % BLOCK
        first = 0 if part == 0 else rows // BLOCK * columns
        blocks = rows // BLOCK * columns if part == 0 else (columns if height else 0)
        for start in range((blocks - 1) // lanes * lanes, -1, -lanes):
            count = min(lanes, blocks - start)
            for lane in range(count):
                block = first + start + lane
                place[lane] = block // columns * BLOCK * columns + block % columns
                if words.size:
                    mask[lane] = MASKS[words[block]]
            _find_rows(codes, low, parity and height == BLOCK, place[:count], mask[:count], height, rows_of)
            for row in range(height - 1, -1, -1):
                for lane in range(count - 1, -1, -1):
                    one, x = rows_of[row, lane], states[lane]
                    limit = tables[one, 0] << np.uint64(20)
                    missing |= limit == 0
                    full = x >= limit
                    stream[at] = np.uint16(x)
                    at -= np.uint64(full)
                    states[lane] = _encoded(x >> (np.uint64(full) << np.uint64(4)), one, tables)
    return -1 if missing else int(at) + 1


def encode(
    codes: Ints, words: Ints, low: int, frequencies: Ints, parity: bool, lanes: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint64]]:
    """Encode the symbols of codes. Returns the stream of words, and the states to begin decoding with.

    Args:
        codes: [O, I] int8 or int32, C-contiguous; ``2 m + c`` with words.
        words: [blocks] uint8 of the lattice; of no length for one context.
        low: bits of each symbol that are left out.
        frequencies: [contexts, 256] int64 by symbol + 128, each below 4096, with at most 4096 in a context.
        parity: as for `decode`.
        lanes: states that take turns.

    Raises:
        ValueError: when a symbol has no frequency in its context.
    """
    stream = np.empty(codes.size + 2, np.uint16)
    states = np.full(lanes, FLOOR, np.uint64)
    first = _encode(codes, words, low, _encoding_tables(frequencies), parity, states, stream)
    if first < 0:
        raise ValueError("rans: expected a frequency for every symbol, got none for one.")
    return stream[first:], states
