"""The decoder of `rans` for eight lanes, in LLVM's instructions; `rans.decode` is the plain way to the same codes.

What takes time is not arithmetic but waiting: a lane's next symbol needs its state, a table, a product and perhaps a
word. So all lanes take one symbol, then all take the next one, with the eight states in registers; and everything that
they look up lies in one piece of memory, which one register addresses. A slot has one byte in it, its code ``2 m + c``
(or m), and the frequency and the start of a symbol are found by that byte, so that the tables stay in the first cache,
which two threads of a core share. One table of 32 bits a slot took as long, and gathers of AVX-512 nearly twice as long
for one frame; see docs/negative-results.md.

Codes go through 64 columns at hand, so that lines of the cache are written as a whole: rows of a matrix of 4096 columns
would all fall on the same eight lines of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from spectral_surgery.kernels import BLOCK
from spectral_surgery.kernels.compile import intrinsic, kernel

LANES = 8
WORDS = LANES * BLOCK // 2  # that eight blocks can take from the stream at most

Array = npt.NDArray[Any]

_SLOTS, _PRECISION, _CONTEXTS = 4096, 12, 6
_LINE = 64  # columns at hand
# offsets in the piece of memory, which begins with a byte for each slot
_FREQUENCY = _CONTEXTS * _SLOTS  # [3, 256] uint64 by code: usual ones, and those of row 31 by parity
_START = _FREQUENCY + 3 * 256 * 8  # [3, 256] uint64, with 4096 times the context
_CONTEXT = _START + 3 * 256 * 8  # [32, 8] uint32: 4096 times the context of each row and lane, without parity
_CODE = _CONTEXT + BLOCK * LANES * 4  # [32, 64] uint8
_SIZE = _CODE + BLOCK * _LINE


def _row(build: Any, space: Any, states: list[Any], at: Any, to: Any, odd: Any) -> list[Any]:
    """One symbol from each state.

    Args:
        build: llvmlite's builder.
        space: address of the piece of memory, as a pointer to bytes.
        at: offset of the row's contexts.
        to: offset of the row's codes.
        odd: 64 bits, of which bit 8 i + 1 is the parity of the symbols before in lane i; None where it does not matter.
    """
    byte, half, word = ir.IntType(8), ir.IntType(32), ir.IntType(64)

    def load(kind: Any, offset: Any) -> Any:
        return build.load(build.bitcast(build.gep(space, [offset]), kind.as_pointer()))

    out = []
    for lane, state in enumerate(states):
        context = load(half, build.add(at, word(4 * lane)))
        parity = word(0)
        if odd is not None:
            parity = build.and_(build.lshr(odd, word(8 * lane + 1)), word(1))
            more = build.add(build.shl(parity, word(_PRECISION + 1)), word(2 * _SLOTS))
            context = build.add(context, build.trunc(more, half))
        slot = build.zext(build.or_(build.and_(build.trunc(state, half), half(_SLOTS - 1)), context), word)
        code = load(byte, slot)
        build.store(code, build.gep(space, [build.add(to, word(lane))]))
        which = build.zext(code, word)
        if odd is not None:
            which = build.add(which, build.shl(build.add(parity, word(1)), word(8)))
        which = build.shl(which, word(3))
        product = build.mul(build.lshr(state, word(_PRECISION)), load(word, build.add(which, word(_FREQUENCY))))
        out.append(build.add(product, build.sub(slot, load(word, build.add(which, word(_START))))))
    return out


def _refill(build: Any, words: Any, states: list[Any], read: Any) -> tuple[list[Any], Any]:
    """A word of the stream for each state below 2^31: the states, and how many words have been read."""
    word, out = ir.IntType(64), []
    for state in states:
        more = build.load(build.gep(words, [read]))
        more.align = 1  # the stream begins at any byte
        turned = build.or_(build.shl(state, word(32)), build.lshr(state, word(32)))  # one instruction: rotate
        small = build.icmp_unsigned("<", state, word(1 << 31))
        out.append(build.select(small, build.or_(turned, build.zext(more, word)), state))
        read = build.add(read, build.zext(small, word))
    return out, read


def _odd(build: Any, space: Any, to: Any) -> Any:
    """The codes of rows 0 to 30, each row as one number, added up without carry; ``to`` is where row 30 is."""
    word = ir.IntType(64)
    total = word(0)
    for row in range(BLOCK - 1):
        place = build.gep(space, [build.add(to, word(-_LINE * (BLOCK - 2 - row)))])
        total = build.xor(total, build.load(build.bitcast(place, word.as_pointer())))
    return total


@intrinsic
def _two_rows(_typing: Any, states: Any, read: Any, words: Any, space: Any, row: Any, column: Any, last: Any) -> Any:
    """Two symbols from each state, and then words.

    Args:
        states: eight uint64.
        read: words read so far.
        words: address of the stream.
        space: address of the piece of memory.
        row: of the block, the first one.
        column: of those at hand.
        last: literal, whether these are rows 30 and 31 with contexts of parity.
    """
    if not isinstance(last, types.Literal):
        return None
    special = bool(last.literal_value)
    out = types.Tuple((states, types.uint64))

    def generate(context: Any, build: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        lanes = cgutils.unpack_tuple(build, values[0])
        stream = build.inttoptr(values[2], ir.IntType(32).as_pointer())
        memory = build.inttoptr(values[3], ir.IntType(8).as_pointer())
        at = build.add(build.mul(values[4], word(4 * LANES)), word(_CONTEXT))
        to = build.add(build.add(build.mul(values[4], word(_LINE)), values[5]), word(_CODE))
        lanes = _row(build, memory, lanes, at, to, None)
        odd = _odd(build, memory, to) if special else None
        lanes = _row(build, memory, lanes, build.add(at, word(4 * LANES)), build.add(to, word(_LINE)), odd)
        lanes, count = _refill(build, stream, lanes, values[1])
        return context.make_tuple(build, signature.return_type, [cgutils.pack_array(build, lanes), count])

    return out(states, read, words, space, row, column, last), generate


@intrinsic
def _set_contexts(_typing: Any, words: Any, masks: Any, space: Any) -> Any:
    """The contexts of eight blocks, from their words, six bits each.

    Args:
        words: uint64, the lowest six bits for the first block.
        masks: address of `lattice.MASKS`.
        space: address of the piece of memory.
    """

    def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
        half, word = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(half, LANES)

        def each(number: int) -> Any:
            return ir.Constant(vector, [number] * LANES)

        table = build.inttoptr(values[1], half.as_pointer())
        memory = build.inttoptr(values[2], ir.IntType(8).as_pointer())
        mask = ir.Constant(vector, ir.Undefined)
        for lane in range(LANES):
            number = build.and_(build.lshr(values[0], word(6 * lane)), word(63))
            mask = build.insert_element(mask, build.load(build.gep(table, [number])), half(lane))
        for row in range(BLOCK):
            left = _PRECISION - row
            bit = build.shl(mask, each(left)) if left >= 0 else build.lshr(mask, each(-left))
            place = build.gep(memory, [word(_CONTEXT + 4 * LANES * row)])
            store = build.store(build.and_(bit, each(_SLOTS)), build.bitcast(place, vector.as_pointer()))
            store.align = 4
        return context.get_dummy_value()

    return types.void(words, masks, space), generate


@intrinsic
def _copy_line(_typing: Any, source: Any, to: Any) -> Any:
    """64 bytes from one address to another."""

    def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
        line = ir.VectorType(ir.IntType(8), _LINE).as_pointer()
        value = build.load(build.inttoptr(values[0], line))
        value.align = 1
        build.store(value, build.inttoptr(values[1], line)).align = 1
        return context.get_dummy_value()

    return types.void(source, to), generate


@kernel
def _fill(space: Array, table: Array, lattice: bool) -> None:
    """The tables of the piece of memory, from that of `rans.decoding_table`."""
    numbers = space[: _CONTEXT // 8 * 8].view(np.uint64)
    space[_CONTEXT:_CODE] = 0
    numbers[_FREQUENCY // 8 :] = 0
    for number in range(table.size):
        entry = table[number]
        context = number // _SLOTS
        code = np.uint8(entry)
        if lattice:
            code = np.uint8(2 * (entry & np.uint32(255)) + np.uint32(context & 1))
        space[number] = code
        if entry:
            which = 256 * (context // 2) + code
            numbers[_FREQUENCY // 8 + which] = entry >> np.uint32(20)
            numbers[_START // 8 + which] = number - (entry >> np.uint32(8) & np.uint32(_SLOTS - 1))


@kernel
def _write(space: Array, address: Any, first: int, count: int, out: Array) -> None:
    """The codes at hand, of ``count`` blocks from ``first`` on, to the matrix."""
    columns = out.shape[1]
    flat = out.reshape(-1)
    done = 0
    while done < count:
        top, column = (first + done) // columns * BLOCK, (first + done) % columns
        width = min(count - done, columns - column)
        for row in range(BLOCK):
            to = (top + row) * columns + column
            if width == _LINE:
                _copy_line(address + np.uint64(_CODE + row * _LINE), np.uint64(flat.ctypes.data + to))
            else:
                for i in range(width):
                    flat[to + i] = np.int8(space[_CODE + row * _LINE + done + i])
        done += width


@kernel
def decode(words: Array, stream: Array, states: Array, table: Array, masks: Array, out: Array) -> tuple[int, int]:
    """Decode whole blocks, eight at a time, while the stream is sure to last; changes the states.

    Returns how many blocks were decoded, and how many words of the stream were read.

    Args:
        words: [n] uint8, those of the lattice, six bits each; of no length for one context.
        stream: [4 n] uint8, little-endian.
        states: [8] uint64.
        table: from `rans.decoding_table`, of one context or of six; with six, symbols are from -64 to 63.
        masks: `lattice.MASKS`.
        out: [O, I] int8: ``2 m + c`` for six contexts, and m for one.
    """
    lattice = words.size > 0
    space = np.empty(_SIZE, np.uint8)
    _fill(space, table, lattice)
    memory, where, all_masks = np.uint64(space.ctypes.data), np.uint64(stream.ctypes.data), np.uint64(masks.ctypes.data)
    lanes = (states[0], states[1], states[2], states[3], states[4], states[5], states[6], states[7])
    blocks, block, held, read = out.shape[0] // BLOCK * out.shape[1], 0, 0, np.uint64(0)
    while block + LANES <= blocks and np.int64(read) + WORDS < stream.size // 4:
        if lattice:
            packed = np.uint64(0)
            for byte in range(6):
                packed |= np.uint64(words[block // LANES * 6 + byte]) << np.uint64(8 * byte)
            _set_contexts(packed, all_masks, memory)
        column = np.uint64(held)
        for row in range(0, BLOCK - 2, 2):
            lanes, read = _two_rows(lanes, read, where, memory, np.uint64(row), column, False)
        if lattice:
            lanes, read = _two_rows(lanes, read, where, memory, np.uint64(BLOCK - 2), column, True)
        else:
            lanes, read = _two_rows(lanes, read, where, memory, np.uint64(BLOCK - 2), column, False)
        block, held = block + LANES, held + LANES
        if held == _LINE:
            _write(space, memory, block - held, held, out)
            held = 0
    _write(space, memory, block - held, held, out)
    for lane in range(LANES):
        states[lane] = lanes[lane]
    return block, int(read)
