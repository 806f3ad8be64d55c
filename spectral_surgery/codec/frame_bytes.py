"""Integer codes of one frame, as bytes and back; docs/format.md has every byte.

A frame is some rows of a matrix of codes, and decodes alone. What is coded are symbols, with tables of how frequent
they are in this frame (`kernels.rans`). Where all codes are points of the lattice (`kernels.lattice`), ``l = 2 m + c``,
the words c are stored as they are, and the m are symbols with a table for each c. All other codes are symbols
themselves. Low bits of large symbols are stored as they are, and a few codes beyond all symbols in a list.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.codec.symbol_table import ABOUT_HALF, ABOUT_ZERO, SymbolTable, fitted_table, with_parity
from spectral_surgery.errors import CheckpointError, ConfigError

Codes = npt.NDArray[Any]  # int8, int16 or int32
Bytes = npt.NDArray[np.uint8]

ZEROS, INTEGERS, LATTICE = range(3)  # kinds of frames
BLOCK = 32  # rows that are coded together

_HEADER = struct.Struct("<BBBBII")  # kind, bytes of a code, low bits, lanes, words of the stream, codes in the list
_STATE_BYTES, _WORD_BYTES = 8, 4
_LANES = ((1 << 17, 8), (1 << 14, 2), (0, 1))  # codes of a frame from which on it has so many: each costs 8 bytes
_MAX_LOW = 24
_DAMAGED = "the data is damaged. Fetch the file again."


@dataclass(frozen=True)
class _Plan:
    """How a frame is stored: its kind, a table for each value of c, low bits of a symbol, and the bits it takes."""

    kind: int
    tables: tuple[SymbolTable, ...]
    low: int
    bits: float


def encode_frame(codes: Codes) -> bytes:
    """Encode the codes of one frame, in whichever way takes the fewest bytes.

    Args:
        codes: [r, I] int8, int16 or int32.

    Raises:
        ConfigError: when codes is not a matrix of signed integers.
    """
    from spectral_surgery.kernels import rans
    from spectral_surgery.kernels.lattice import MASKS

    if codes.ndim != 2 or codes.dtype not in (np.int8, np.int16, np.int32):
        raise ConfigError(f"encode_frame: codes are {codes.dtype} {codes.shape}; expected int8, int16 or int32 [r, I].")
    wide = np.ascontiguousarray(codes, np.int32)
    if not wide.any():
        return _HEADER.pack(ZEROS, codes.itemsize, 0, 0, 0, 0)
    plan, words = _cheapest(wide, codes.itemsize)
    lattice = plan.kind == LATTICE
    symbols = np.empty_like(wide)
    rans.symbols_of(wide, lattice, plan.low, symbols, np.zeros((2, 256), np.int64))
    m = wide >> 1 if lattice else wide
    listed = wide[np.abs(symbols) > rans.LARGEST]
    masks = MASKS[words] if lattice else np.zeros(0, np.uint32)
    lanes = next(lanes for least, lanes in _LANES if wide.size >= least)
    stream, states = rans.encode(symbols, masks, _frequencies(plan), lattice and not plan.low, lanes)
    header = _HEADER.pack(plan.kind, codes.itemsize, plan.low, lanes, len(stream), len(listed))
    tables = b"".join(table.to_bytes() for table in plan.tables)
    packed = _packed_words(words, wide.shape) if lattice else b""
    coded = (states.astype("<u8").tobytes(), stream.astype("<u4").tobytes())
    return b"".join(
        (header, tables, packed, *coded, _packed(m, plan.low), listed.astype(f"<i{codes.itemsize}").tobytes())
    )


def decode_frame(frame: bytes | memoryview, shape: tuple[int, int], out: Codes | None = None) -> Codes:
    """Decode one frame; the inverse of `encode_frame`.

    Every size is checked against the shape before anything of that size is allocated. Returns [r, I] int8, int16 or
    int32, as encoded; ``out`` itself where codes are int8 and it is given.

    Args:
        frame: the bytes of one frame.
        shape: (r, I) that it must have.
        out: [r, I] int8, C-contiguous, where int8 codes are written to.

    Raises:
        CheckpointError: when the frame is damaged.
    """
    from spectral_surgery.kernels import rans
    from spectral_surgery.kernels.lattice import MASKS

    view = memoryview(frame)
    kind, itemsize, low, lanes, length, listed = _header(view, shape)
    if itemsize != 1 or out is None:
        out = np.empty(shape, np.dtype(f"i{itemsize}"))
    if kind == ZEROS:
        out.fill(0)
        return out
    tables, at = _tables(view, kind, low)
    lattice = kind == LATTICE
    before = (_words_bytes(shape) if lattice else 0, _STATE_BYTES * lanes, _WORD_BYTES * length)
    sizes = (*before, -(-low * out.size // 8), itemsize * listed)
    if at + sum(sizes) != len(view):
        raise CheckpointError(f"spectral frame: its parts do not add up to its {len(view)} bytes; {_DAMAGED}")
    words, states, stream, lows, entries = _split(view[at:], sizes)
    masks = MASKS[_unpacked_words(words, shape)] if lattice else np.zeros(0, np.uint32)
    padded = np.zeros(length + 1, np.uint32)
    padded[:length] = np.frombuffer(stream, "<u4")
    direct = itemsize == 1 and not low and not listed
    symbols = out if direct else np.empty(shape, np.int32)
    table = rans.decoding_table(_frequencies(_Plan(kind, tables, low, 0.0)))
    entry = np.frombuffer(states, "<u8").astype(np.uint64)
    read = rans.decode(padded, entry, table, masks, symbols, lattice and not low, int(lattice and direct))
    if read != length:
        raise CheckpointError(f"spectral frame: the stream does not end where it should; {_DAMAGED}")
    if not direct:
        m = (symbols << low) | _unpacked(lows, symbols.size, low).reshape(shape)
        out[:] = 2 * m + _odd(masks, shape) if lattice else m
        large = np.abs(symbols) > rans.LARGEST
        if np.count_nonzero(large) != listed:
            raise CheckpointError(
                f"spectral frame: a list of {listed} codes has another length than needed; {_DAMAGED}"
            )
        out[large] = np.frombuffer(entries, f"<i{itemsize}")
    return out


def _cheapest(codes: Codes, itemsize: int) -> tuple[_Plan, Bytes]:
    """The plan of the fewest bits for codes [r, I] int32, and the words of the lattice, of no length if it has none."""
    from spectral_surgery.kernels.lattice import words_of

    words = np.empty(_blocks(codes.shape), np.uint8)
    plans = [_plan(codes, itemsize, INTEGERS, 0)]
    if words_of(codes, words):
        plans.append(_plan(codes, itemsize, LATTICE, 8 * _words_bytes(codes.shape)))
    else:
        words = words[:0]
    return min(plans, key=lambda plan: plan.bits), words


def _plan(codes: Codes, itemsize: int, kind: int, fixed: int) -> _Plan:
    """The plan of the fewest bits for a kind of frame; ``fixed`` bits are the same for all."""
    best = _with_low(codes, itemsize, kind, fixed, 0)[0]
    for low in range(1, _MAX_LOW + 1):
        plan, listed = _with_low(codes, itemsize, kind, fixed, low)
        if plan.bits < best.bits:
            best = plan
        elif 8 * listed < codes.size:  # else it may be that all are beyond, and one bit does not help
            break
    return best


def _with_low(codes: Codes, itemsize: int, kind: int, fixed: int, low: int) -> tuple[_Plan, int]:
    """The plan with so many low bits, and how many codes it has in the list."""
    from spectral_surgery.kernels.rans import symbols_of

    counts = np.zeros((2, 256), np.int64)
    listed = symbols_of(codes, kind == LATTICE, low, np.empty_like(codes), counts)
    tables = tuple(fitted_table(one, symmetry) for one, symmetry in zip(counts, _symmetries(kind, low), strict=False))
    coded = sum(table.bits(one) for table, one in zip(tables, counts, strict=False))
    return _Plan(kind, tables, low, fixed + low * codes.size + 8 * itemsize * listed + coded), listed


def _symmetries(kind: int, low: int) -> tuple[int, ...]:
    """Of the table for each c."""
    main = ABOUT_HALF if low else ABOUT_ZERO
    return (main, ABOUT_HALF) if kind == LATTICE else (main,)


def _frequencies(plan: _Plan) -> npt.NDArray[np.int64]:
    """[contexts, 256], in the order of `kernels.rans`."""
    main = np.stack([table.by_symbol() for table in plan.tables])
    if plan.kind == INTEGERS or plan.low:
        return main
    known = [with_parity(one) for one in main]
    return np.concatenate((main, [known[c][parity] for parity in (0, 1) for c in (0, 1)]))


def _header(view: memoryview, shape: tuple[int, int]) -> tuple[int, int, int, int, int, int]:
    if len(view) < _HEADER.size:
        raise CheckpointError(f"spectral frame: {len(view)} bytes are too few for a header; {_DAMAGED}")
    fields: tuple[int, int, int, int, int, int] = _HEADER.unpack_from(view)
    kind, itemsize, low, lanes, _, listed = fields
    if kind > LATTICE or itemsize not in (1, 2, 4) or low > _MAX_LOW or (kind != ZEROS) != (0 < lanes <= 64):
        raise CheckpointError(
            f"spectral frame: unknown kind {kind}/{itemsize}/{low}/{lanes}; written by another version, or damaged."
            " Update spectral_surgery, or fetch the file again."
        )
    if listed > shape[0] * shape[1]:
        raise CheckpointError(f"spectral frame: a list of {listed} codes is longer than the frame; {_DAMAGED}")
    return fields


def _tables(view: memoryview, kind: int, low: int) -> tuple[tuple[SymbolTable, ...], int]:
    """The tables, and where they end."""
    at, tables = _HEADER.size, []
    for symmetry in _symmetries(kind, low):
        table, size = SymbolTable.from_bytes(view[at:], symmetry)
        tables.append(table)
        at += size
    return tuple(tables), at


def _split(view: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    ends = np.cumsum(sizes)
    return [view[end - size : end] for size, end in zip(sizes, ends, strict=True)]


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
    out, start = b"", 0
    for blocks, bits in _word_groups(shape):
        out += _packed(words[start : start + blocks], bits)
        start += blocks
    return out


def _unpacked_words(data: memoryview, shape: tuple[int, int]) -> Bytes:
    out, at = [], 0
    for blocks, bits in _word_groups(shape):
        size = -(-blocks * bits // 8)
        out.append(_unpacked(data[at : at + size], blocks, bits).astype(np.uint8))
        at += size
    return np.concatenate(out)


def _packed(numbers: Codes, bits: int) -> bytes:
    """The low bits of numbers, one after the other, the lowest bit first."""
    if not bits:
        return b""
    places = np.arange(bits, dtype=numbers.dtype)
    return np.packbits((numbers.reshape(-1, 1) >> places) & 1, bitorder="little").tobytes()


def _unpacked(data: memoryview, count: int, bits: int) -> npt.NDArray[np.int32]:
    flags = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.int32)
    total: npt.NDArray[np.int32] = flags.reshape(count, bits).astype(np.int32) @ weights
    return total


def _odd(masks: Codes, shape: tuple[int, int]) -> Codes:
    """C at every position, [r, I] int32, from the bits of each block."""
    blocks = masks.reshape(-1, 1, shape[1]) >> np.arange(BLOCK, dtype=np.uint32)[None, :, None]
    return (blocks & 1).astype(np.int32).reshape(-1, shape[1])[: shape[0]]
