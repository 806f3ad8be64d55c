"""Integer codes of one frame, as bytes and back; docs/format.md has every byte.

A frame is some rows of a matrix of codes, and decodes alone. What is coded are symbols, with tables of how frequent
they are in this frame (`kernels.rans`). Where all codes are points of the lattice (`kernels.lattice`), ``l = 2 m + c``,
the words c are stored as they are, and the m are symbols with a table for each c; where the transposed codes are points
of it, these are stored. All other codes are symbols themselves. Low bits of large symbols are stored as they are, and a
few codes beyond all symbols in a list.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.codec.symbol_table import ABOUT_HALF, ABOUT_ZERO, SymbolTable
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.kernels import BLOCK, SHORT

Codes = npt.NDArray[Any]  # int8, int16 or int32
Bytes = npt.NDArray[np.uint8]

ZEROS, INTEGERS, LATTICE, TURNED = range(4)  # kinds of frames

_HEADER = struct.Struct("<BBBBII")  # kind, bytes of a code, low bits, lanes, words of the stream, codes in the list
_MAX_LOW = 24
_LARGE, _FEW = 1 << 16, 48  # codes of a frame, entries of a table: low bits are then never worth leaving out
_DAMAGED = "the data is damaged. Fetch the file again."


@dataclass(frozen=True)
class _Plan:
    """How a frame is stored: its kind, a table for each c, low bits of a symbol, codes of the list, bits it takes."""

    kind: int
    tables: tuple[SymbolTable, ...]
    low: int
    listed: int
    bits: float


def encode_frame(codes: Codes, *, plain: bool = False) -> bytes:
    """Encode the codes of one frame, in whichever way takes the fewest bytes.

    Args:
        codes: [r, I] int8, int16 or int32.
        plain: as integers without low bits, whatever takes fewer bytes: what decodes fastest.

    Raises:
        ConfigError: when codes is not a matrix of signed integers.
    """
    from spectral_surgery.kernels import rans

    if codes.ndim != 2 or codes.dtype not in (np.int8, np.int16, np.int32):
        raise ConfigError(f"encode_frame: codes are {codes.dtype} {codes.shape}; expected int8, int16 or int32 [r, I].")
    seen: Codes = np.ascontiguousarray(
        codes, np.int8 if codes.itemsize == 1 else np.int32
    )  # kernels are compiled for these
    if not seen.any():
        return _HEADER.pack(ZEROS, codes.itemsize, 0, 0, 0, 0)
    words = seen.reshape(-1)[:0].view(np.uint8) if plain else _words(seen)
    if not plain and not len(words) and len(_words(seen.T[:BLOCK])) and len(_words(seen.T)):
        turned = encode_frame(codes.T)
        if turned[0] == LATTICE:
            return bytes([TURNED]) + turned[1:]
    plan = _plan(seen, codes.itemsize, INTEGERS, 0, most_low=0) if plain else _cheapest(seen, words, codes.itemsize)
    lattice = plan.kind == LATTICE
    words = words if lattice else words[:0]
    lanes = _lanes(seen.size, plan.bits)
    tables = b"".join(table.to_bytes() for table in plan.tables)
    frequencies, _ = _frequencies(memoryview(tables), 0, plan.kind, plan.low)
    stream, states = rans.encode(seen, words, plan.low, frequencies, lattice and not plan.low, lanes)
    wide: Codes = seen.astype(np.int32) if plan.low or plan.listed else seen[:0]
    symbols = wide >> plan.low + lattice
    listed = wide[(symbols > rans.LARGEST) | (symbols < -rans.LARGEST)]
    header = _HEADER.pack(plan.kind, codes.itemsize, plan.low, lanes | SHORT, len(stream), len(listed))
    coded = (_packed_words(words, seen.shape), states.astype("<u4").tobytes(), stream.astype("<u2").tobytes())
    low = _packed(wide >> lattice, plan.low)
    return b"".join((header, tables, *coded, low, listed.astype(f"<i{codes.itemsize}").tobytes()))


def _lanes(codes: int, bits: float) -> int:
    """Lanes of a frame: each costs three bytes, 0.6 % at most of a stream that has so many; 16 decode in vectors."""
    if bits >= 1 << 19:
        return 64
    if bits >= 1 << 16 or codes >= 1 << 18:
        return 16
    return 4 if bits >= 1 << 14 else 1


def decode_frame(frame: bytes | memoryview, shape: tuple[int, int], out: Codes | None = None) -> Codes:
    """Decode one frame; the inverse of `encode_frame`.

    Every size is checked against the shape and the bytes before anything of that size is allocated. Codes alone can be
    far more than the bytes: whoever names the shape bounds them. Returns [r, I] int8, int16 or int32, as encoded;
    ``out`` itself where codes are int8 and it is given.

    Args:
        frame: the bytes of one frame.
        shape: (r, I) that it must have.
        out: [r, I] int8, C-contiguous, where int8 codes are written to.

    Raises:
        CheckpointError: when the frame is damaged.
    """
    from spectral_surgery.kernels import frames

    view = memoryview(frame)
    if view[:1] == bytes([TURNED]):
        turned = decode_frame(bytes([LATTICE]) + view[1:], shape[::-1]).T
        out = out if out is not None and turned.itemsize == 1 else np.empty(shape, turned.dtype)
        out[:] = turned
        return out
    kind, itemsize, low, lanes, length, listed = _header(view, shape)
    whole, lattice, data = itemsize == 1 and not listed, kind == LATTICE, _read_only(view)
    symbols = out if whole and out is not None else np.empty(shape, np.int8)
    found = frames.decode(data.ctypes.data, len(data), symbols)
    if found == frames.CODES:
        return symbols
    frequencies, at = _frequencies(view, _HEADER.size, kind, low)
    short = lanes >= SHORT
    coded = (4 * (lanes - SHORT), 2 * length) if short else (8 * lanes, 4 * length)
    before = (_words_bytes(shape) if lattice else 0, *coded)
    sizes = (*before, -(-low * shape[0] * shape[1] // 8), itemsize * listed)
    if at + sum(sizes) != len(view):
        raise CheckpointError(f"spectral frame: its parts do not add up to its {len(view)} bytes; {_DAMAGED}")
    if kind == ZEROS:
        return np.zeros(shape, np.dtype(f"i{itemsize}"))
    parts = _split(view[at:], sizes)
    if found == frames.NEITHER:
        symbols = np.empty(shape, np.int16 if lattice else np.int8)
        _decode_symbols(parts, short, frequencies, symbols, not low)
    codes = out if itemsize == 1 and out is not None else np.empty(shape, np.dtype(f"i{itemsize}"))
    _widen(symbols, lattice, low, parts, codes)
    return codes


def _decode_symbols(parts: list[memoryview], short: bool, frequencies: Codes, symbols: Codes, parity: bool) -> None:
    """The symbols m of a frame, or ``2 m + c`` where it has words, plainly: `kernels.frames` decodes most of them."""
    from spectral_surgery.kernels import rans

    stream = np.frombuffer(parts[2], "<u2" if short else "<u4")
    states = np.frombuffer(parts[1], "<u4" if short else "<u8").astype(np.uint64)
    padded = np.append(stream, stream.dtype.type(0))
    words = _unpacked_words(parts[0], symbols.shape) if len(parts[0]) else np.empty(0, np.uint8)
    table, lattice = rans.decoding_table(frequencies), len(words) > 0
    if rans.decode(padded, states, table, words, symbols, lattice and parity, 0) != len(stream):
        raise CheckpointError(f"spectral frame: the stream does not end where it should; {_DAMAGED}")


def _widen(symbols: Codes, lattice: bool, low: int, parts: list[memoryview], out: Codes) -> None:
    """Codes from symbols [r, I], or ``2 m + c`` of a lattice, with their low bits and those of the list."""
    from spectral_surgery.kernels.rans import LARGEST

    m = symbols.astype(np.int32) >> lattice
    wide = (m << low) | _unpacked(parts[3], m.size, low).reshape(m.shape) if low else m
    out[:] = 2 * wide + (symbols & 1) if lattice else wide
    large, listed = np.abs(m) > LARGEST, len(parts[4]) // out.itemsize
    if np.count_nonzero(large) != listed:
        raise CheckpointError(f"spectral frame: a list of {listed} codes has another length than needed; {_DAMAGED}")
    out[large] = np.frombuffer(parts[4], f"<i{out.itemsize}")


def _words(codes: Codes) -> Bytes:
    """The words of codes [r, I] that are points of the lattice, by block; of no length where they are not."""
    from spectral_surgery.kernels.lattice import words_of

    words = np.empty(_blocks(codes.shape), np.uint8)
    return words if words_of(np.ascontiguousarray(codes), words) else words[:0]


def _cheapest(codes: Codes, words: Bytes, itemsize: int) -> _Plan:
    """The plan of the fewest bits for codes [r, I] and their words."""
    plans = [_plan(codes, itemsize, INTEGERS, 0)]
    if len(words):
        plans.append(_plan(codes, itemsize, LATTICE, 8 * _words_bytes(codes.shape)))
    return min(plans, key=lambda plan: plan.bits)


def _plan(codes: Codes, itemsize: int, kind: int, fixed: int, most_low: int = _MAX_LOW) -> _Plan:
    """The plan of the fewest bits for a kind of frame; ``fixed`` bits are the same for all."""
    best = _with_low(codes, itemsize, kind, fixed, 0)
    if codes.size >= _LARGE and not best.listed and max(len(table.entries) for table in best.tables) < _FEW:
        return best
    for low in range(1, most_low + 1):
        plan = _with_low(codes, itemsize, kind, fixed, low)
        if plan.bits < best.bits:
            best = plan
        elif 8 * plan.listed < codes.size:  # else it may be that all are beyond, and one bit does not help
            break
    return best


def _with_low(codes: Codes, itemsize: int, kind: int, fixed: int, low: int) -> _Plan:
    """The plan with so many low bits."""
    from spectral_surgery.kernels.frame_plans import frame_tables
    from spectral_surgery.kernels.rans import count_symbols

    counts, entries, tables = np.zeros((2, 256), np.int64), np.empty((2, 256), np.int64), np.empty((2, 3), np.int64)
    lattice = kind == LATTICE
    listed = count_symbols(codes, lattice, low, counts)
    coded = frame_tables(counts, lattice, low, codes.shape[0] // BLOCK * codes.shape[1], entries, tables)
    found = tuple(
        SymbolTable(symmetry, tuple(some[:size].tolist()), first)
        for some, (symmetry, first, size) in zip(entries[: 1 + lattice], tables.tolist(), strict=False)
    )
    return _Plan(kind, found, low, listed, fixed + low * codes.size + 8 * itemsize * listed + coded)


def _symmetries(kind: int, low: int) -> tuple[int, ...]:
    """Of the table for each c."""
    main = ABOUT_HALF if low else ABOUT_ZERO
    return {ZEROS: (), INTEGERS: (main,), LATTICE: (main, ABOUT_HALF)}[kind]


def _frequencies(data: memoryview, at: int, kind: int, low: int) -> tuple[npt.NDArray[np.int64], int]:
    """[contexts, 256] of tables that begin somewhere, in the order of `kernels.rans`, and where they end."""
    from spectral_surgery.kernels.frame_parts import read_tables

    symmetries = _symmetries(kind, low)
    out = np.zeros((6 if kind == LATTICE and not low else len(symmetries), 256), np.int64)
    end = read_tables(_read_only(data), at, len(symmetries), ABOUT_HALF if low else ABOUT_ZERO, out)
    for symmetry in symmetries if end < 0 else ():
        at += SymbolTable.from_bytes(data[at:], symmetry)[1]  # raises what is wrong with it
    return out, end


def _read_only(data: memoryview) -> Bytes:
    """Bytes as kernels take them, which are compiled once more for those that may be written."""
    seen = np.frombuffer(data, np.uint8)
    seen.flags.writeable = False
    return seen


def _header(view: memoryview, shape: tuple[int, int]) -> tuple[int, int, int, int, int, int]:
    if len(view) < _HEADER.size:
        raise CheckpointError(f"spectral frame: {len(view)} bytes are too few for a header; {_DAMAGED}")
    fields: tuple[int, int, int, int, int, int] = _HEADER.unpack_from(view)
    kind, itemsize, low, lanes, _, listed = fields
    if kind > LATTICE or itemsize not in (1, 2, 4) or low > _MAX_LOW or (kind != ZEROS) != (0 < lanes & ~SHORT <= 64):
        raise CheckpointError(
            f"spectral frame: unknown kind {kind}/{itemsize}/{low}/{lanes}; written by another version, or damaged."
            " Update spectral_surgery, or fetch the file again."
        )
    size = shape[0] * shape[1]
    fits = not any(fields[2:]) if kind == ZEROS else size > 0 and listed <= size
    if not fits:
        raise CheckpointError(f"spectral frame: {fields} cannot be of {shape} codes; {_DAMAGED}")
    return fields


def _split(view: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    return [view[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _blocks(shape: tuple[int, ...]) -> int:
    """Blocks of 32 rows of one column; those of the rows that are left come last."""
    return -(-shape[0] // BLOCK) * shape[1]


def _word_groups(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Blocks and bits of a word: of whole blocks, and of the rows that are left."""
    from spectral_surgery.kernels.lattice import word_bits

    whole, left = divmod(shape[0], BLOCK)
    groups = [(whole * shape[1], word_bits(BLOCK)), (shape[1], word_bits(left) if left else 0)]
    return [(blocks, bits) for blocks, bits in groups if blocks and bits]


def _words_bytes(shape: tuple[int, ...]) -> int:
    return sum(-(-blocks * bits // 8) for blocks, bits in _word_groups(shape))


def _packed_words(words: Bytes, shape: tuple[int, ...]) -> bytes:
    """As the frame has them; nothing for no words."""
    out, start = b"", 0
    for blocks, bits in _word_groups(shape):
        out += _packed(words[start : start + blocks], bits)
        start += blocks
    return out


def _unpacked_words(data: memoryview, shape: tuple[int, ...]) -> Bytes:
    from spectral_surgery.kernels.frame_parts import unpack

    groups = _word_groups(shape)
    out = np.empty(sum(blocks for blocks, _ in groups), np.uint8)
    at, done, seen = 0, 0, _read_only(data)
    for blocks, bits in groups:
        unpack(seen, at, bits, out[done : done + blocks])
        at, done = at - (-blocks * bits // 8), done + blocks
    return out


def _packed(numbers: Codes, bits: int) -> bytes:
    """The low bits of numbers, one after the other, the lowest bit first."""
    flags = np.empty((numbers.size, bits), np.uint8)
    for bit in range(bits):
        flags[:, bit] = numbers.reshape(-1) >> bit & 1
    return np.packbits(flags, bitorder="little").tobytes()


def _unpacked(data: memoryview, count: int, bits: int) -> npt.NDArray[np.int32]:
    """The inverse of `_packed`: [count] numbers of 1 to 24 bits. Eight of them are a whole number of bytes."""
    octets = np.zeros((-(-count // 8), bits), np.uint8)
    octets.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    out = np.empty((len(octets), 8), np.int32)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        number = np.zeros(len(octets), np.int32)
        for byte in range(first, -(-(place + 1) * bits // 8)):
            number |= octets[:, byte].astype(np.int32) << 8 * (byte - first)
        out[:, place] = (number >> shift) & ((1 << bits) - 1)
    return out.reshape(-1)[:count]
