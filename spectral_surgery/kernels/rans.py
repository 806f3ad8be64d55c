"""An entropy coder at the entropy: range asymmetric numeral systems, on blocks of 32 rows of one column.

A state x in [2^31, 2^63) stands for all that is to come. To decode a symbol of frequency f and start b, of 4096 slots,
``slot = x mod 4096`` finds it, and ``x = f * (x // 4096) + slot - b``. After two symbols a state below 2^31 takes in
32 bits more. Several lanes, each with a state, take blocks in turn, so that a processor always has something to do;
they share one stream of words. Source: J. Duda, arXiv 1311.2540; lanes in one stream: F. Giesen, arXiv 1402.3392.

A symbol is coded with the table of its context. With words of the lattice (see `lattice`) this is the bit c of its
position, and in row 31 also the parity of the symbols before it: contexts are c, and 2 + c + 2 * parity in row 31.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels import BLOCK
from spectral_surgery.kernels.compile import inlined, kernel

PRECISION = 12
SLOTS = 1 << PRECISION
FLOOR = 1 << 31  # the least state
LARGEST = 125  # magnitude of a symbol that stands for itself; 126 and 127 stand for all larger ones

Ints = npt.NDArray[Any]

_P, _ONE, _FLOOR = np.uint64(PRECISION), np.uint64(1), np.uint64(FLOOR)
_SLOT, _SHIFT_START, _SHIFT_FREQUENCY = np.uint64(SLOTS - 1), np.uint64(8), np.uint64(20)
_WORD = np.uint64(32)
_PARITY = np.uint64(2 * SLOTS)


@kernel
def symbols_of(codes: Ints, lattice: bool, low: int, symbols: Ints, counts: Ints) -> int:
    """Symbols of codes, without their low bits, and how often each occurs.

    One beyond 125 in magnitude becomes 126 or 127, whichever is odd or even as it is. Returns how many are.

    Args:
        codes: [r, I] int32.
        lattice: whether codes are ``2 m + c``, and symbols are those of m.
        low: bits that are left out.
        symbols: [r, I] int32, written.
        counts: [2, 256] int64, added to: by c, which is zero without a lattice, and symbol + 128.
    """
    flat, out = codes.reshape(-1), symbols.reshape(-1)
    shift, beyond = low + (1 if lattice else 0), 0
    for place in range(flat.size):
        code = flat[place]
        c = (code & 1) if lattice else 0
        symbol = code >> shift
        if abs(symbol) > LARGEST:
            near = LARGEST + 1 + (symbol & 1)
            symbol = near if symbol > 0 else -near
            beyond += 1
        out[place] = symbol
        counts[c, symbol + 128] += 1
    return beyond


def decoding_table(frequencies: Ints) -> npt.NDArray[np.uint32]:
    """Slots of every context: [contexts, 256] frequencies, by symbol + 128, to [contexts * 4096] uint32.

    A slot holds the frequency (12 bits), its place within the symbol (12 bits) and the symbol (8 bits). Slots that no
    symbol has are zero.
    """
    table = np.zeros((len(frequencies), SLOTS), np.uint32)
    symbols = (np.arange(256) - 128) & 255
    for slots, counts in zip(table, frequencies, strict=True):
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        place = np.arange(starts.size) - starts
        slots[: starts.size] = np.repeat((counts << 20) | symbols, counts) | (place << 8)
    return table.reshape(-1)


@kernel
def _decoded(x: np.uint64, context: np.uint64, table: Ints) -> tuple[np.uint64, np.uint64]:
    slot = np.uint64(table[context | (x & _SLOT)])
    return slot, (slot >> _SHIFT_FREQUENCY) * (x >> _P) + ((slot >> _SHIFT_START) & _SLOT)


@kernel
def _level(slot: np.uint64, context: np.uint64, double: np.int32) -> np.int32:
    value = np.int32(np.int8(slot & np.uint64(255)))
    return (value << double) + np.int32((context >> _P) & np.uint64(double))


@kernel
def decode(words: Ints, states: Ints, table: Ints, masks: Ints, out: Ints, parity: bool, double: int) -> int:
    """Decode a matrix of symbols.

    Returns how many words were read, or -1 where the states do not end where they began.

    Args:
        words: [n + 1] uint32, the stream and one spare.
        states: [lanes] uint64, not changed.
        table: from `decoding_table`.
        masks: [blocks] uint32, the bits c of each block; of no length for one context.
        out: [O, I] int8 or int32.
        parity: whether row 31 has the contexts of parity.
        double: 1 to write ``2 m + c`` for a symbol m; 0 to write m.
    """
    rows, columns = out.shape
    lanes = states.size
    flat = out.reshape(-1)
    state, mask, odd = states.copy(), np.zeros(lanes, np.uint64), np.zeros(lanes, np.uint64)
    place = np.zeros(lanes, np.int64)
    twice, last, read = np.int32(double), np.uint64(words.size - 1), np.uint64(0)
    for part in range(2):  # whole blocks, then those of the rows that are left
        height = BLOCK if part == 0 else rows % BLOCK
        first = 0 if part == 0 else rows // BLOCK * columns
        blocks = rows // BLOCK * columns if part == 0 else (columns if height else 0)
        for start in range(0, blocks, lanes):
            count = min(lanes, blocks - start)
            for lane in range(count):
                block = first + start + lane
                place[lane] = block // columns * BLOCK * columns + block % columns
                mask[lane] = np.uint64(masks[block]) << _P if masks.size else np.uint64(0)
                odd[lane] = np.uint64(0)
            for row in range(0, height, 2):
                special = parity and row == BLOCK - 2
                single = row + 1 == height
                for lane in range(count):
                    x, bits, at = state[lane], mask[lane], place[lane]
                    context = bits & np.uint64(SLOTS)
                    slot, x = _decoded(x, context, table)
                    flat[at] = _level(slot, context, twice)
                    if not single:
                        context = (bits >> _ONE) & np.uint64(SLOTS)
                        if special:
                            context |= _PARITY + (((odd[lane] ^ slot) & _ONE) << np.uint64(PRECISION + 1)) * _ONE
                        other, x = _decoded(x, context, table)
                        flat[at + columns] = _level(other, context, twice)
                        odd[lane] ^= slot ^ other
                    mask[lane] = bits >> np.uint64(2)
                    place[lane] = at + 2 * columns
                    small = x < _FLOOR
                    more = (x << _WORD) | np.uint64(words[min(read, last)])
                    state[lane] = more if small else x
                    read += np.uint64(small)
    for lane in range(lanes):
        if state[lane] != _FLOOR:
            return -1
    return int(read)


@inlined
def _encoded(x: Any, at: Any, frequencies: Ints, starts: Ints, inverse: Ints) -> Any:
    """The state with one symbol more; ``at`` is 256 times its context plus the symbol + 128."""
    frequency = frequencies[at]
    quotient = np.int64(np.float64(x) * inverse[at])  # off by one at most, as x / frequency is below 2^51
    rest = x - quotient * frequency
    over, under = np.int64(rest >= frequency), np.int64(rest < 0)
    return ((quotient + over - under) << PRECISION) + rest + (under - over) * frequency + starts[at]


@inlined
def _odd(flat: Ints, place: int, columns: int) -> int:
    """Parity of the first 31 symbols of a block."""
    odd = 0
    for row in range(BLOCK - 1):
        odd ^= flat[place + row * columns]
    return odd & 1


@kernel
def _encode(
    symbols: Ints, masks: Ints, frequencies: Ints, starts: Ints, inverse: Ints, parity: bool, states: Ints, words: Ints
) -> int:
    """Encode backwards, from the end of ``words``. Returns the first word; -1 where a symbol has no frequency."""
    rows, columns = symbols.shape
    lanes = states.size
    flat = symbols.reshape(-1)
    place, mask, last = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    at = words.size
    for part in range(1, -1, -1):
        height = BLOCK if part == 0 else rows % BLOCK
        first = 0 if part == 0 else rows // BLOCK * columns
        blocks = rows // BLOCK * columns if part == 0 else (columns if height else 0)
        for start in range((blocks - 1) // lanes * lanes, -1, -lanes):
            count = min(lanes, blocks - start)
            for lane in range(count):
                block = first + start + lane
                place[lane] = block // columns * BLOCK * columns + block % columns
                mask[lane] = np.int64(masks[block]) if masks.size else np.int64(0)
                last[lane] = 2 + 2 * _odd(flat, place[lane], columns) if parity and height == BLOCK else 0
            for row in range((height - 1) // 2 * 2, -1, -2):
                single = row + 1 == height
                for lane in range(count - 1, -1, -1):
                    here = place[lane] + row * columns
                    bits, x = mask[lane] >> row, states[lane]
                    symbol = ((bits & 1) << 8) + flat[here] + 128
                    limit, other = frequencies[symbol] << 51, np.int64(0)
                    if not single:
                        context = ((bits >> 1) & 1) + (last[lane] if row == BLOCK - 2 else 0)
                        other = (context << 8) + flat[here + columns] + 128
                        limit = (frequencies[symbol] * frequencies[other]) << 39
                    if limit == 0:
                        return -1
                    if x >= limit:
                        at -= 1
                        words[at] = np.uint32(x & 0xFFFFFFFF)
                        x >>= 32
                    if not single:
                        x = _encoded(x, other, frequencies, starts, inverse)
                    states[lane] = _encoded(x, symbol, frequencies, starts, inverse)
    return at


def encode(
    symbols: Ints, masks: Ints, frequencies: Ints, parity: bool, lanes: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
    """Encode a matrix of symbols. Returns the stream of words, and the states to begin decoding with.

    Args:
        symbols: [O, I] int32 in -128 to 127.
        masks: as for `decode`.
        frequencies: [contexts, 256] int64 by symbol + 128, each below 4096, with at most 4096 in a context.
        parity: as for `decode`.
        lanes: states that take turns.

    Raises:
        ValueError: when a symbol has no frequency in its context.
    """
    starts = (np.cumsum(frequencies, axis=1) - frequencies).reshape(-1)
    flat = frequencies.reshape(-1)
    inverse = 1.0 / np.maximum(flat, 1)
    words = np.empty(symbols.size // 2 + symbols.shape[1] + 1, np.uint32)
    states = np.full(lanes, FLOOR, np.int64)
    first = _encode(symbols, masks, flat, starts, inverse, parity, states, words)
    if first < 0:
        raise ValueError("rans: expected a frequency for every symbol, got none for one.")
    return words[first:], states.view(np.uint64)
