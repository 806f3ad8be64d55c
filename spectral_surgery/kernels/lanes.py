"""The decoder of `rans` for 16 or 64 lanes in vector instructions; `rans.decode` is the plain way to the same codes.

A lane waits for its table and its product before it can take the next symbol. Sixteen lanes are one vector, and in a
large frame four vectors are under way at a time. All that a slot says is one number of 32 bits, so that a vector needs
one gather for its symbols, and words of the stream for some of its lanes are a load and one instruction that spreads
what was loaded. With AVX2 alone words are spread by a table of 256 orders; without it, everything is decoded plainly.

Codes go through 64 columns at hand, so that lines of the cache are written as a whole: rows of a matrix of 4096 columns
would all fall on the same eight lines of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from spectral_surgery.kernels import BLOCK
from spectral_surgery.kernels.compile import features, intrinsic, is_amd, kernel
from spectral_surgery.kernels.lattice import MASKS
from spectral_surgery.kernels.rans import PRECISION, SLOTS

LANES = (16, 64)
LINE = 64  # columns at hand

Array = npt.NDArray[Any]

_WIDTH = 16  # lanes of a vector
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LANE = ir.VectorType(_I32, _WIDTH)


def _all(number: int) -> Any:
    return ir.Constant(_LANE, [number] * _WIDTH)


class _Lanes:
    """Writes the decoding of one block in each lane.

    Args:
        context: numba's, of the processor.
        build: llvmlite's builder.
        table, stream, orders: addresses, see `decode`.
    """

    def __init__(self, context: Any, build: Any, table: Any, stream: Any, orders: Any) -> None:
        self.build, self.wide = build, "+avx512f" in features(context)
        self.gathers = not is_amd(context)  # where they are as many loads, and more
        self.table = build.inttoptr(table, _I32.as_pointer())
        self.stream = build.inttoptr(stream, _I16.as_pointer())
        self.orders = build.inttoptr(orders, ir.VectorType(_I8, 8).as_pointer())

    def block(self, states: list[Any], masks: list[Any], read: Any, to: Any) -> tuple[list[Any], Any]:
        """The 32 rows of a block in each lane: the states after them, and how many words have been read then.

        Args:
            states: vectors.
            masks: vectors, of the blocks: bit i is c in row i.
            read: words read so far.
            to: address of the codes of the first row.
        """
        build, count = self.build, len(states)
        before, loop, end = build.basic_block, *(build.append_basic_block(name) for name in ("rows", "decoded"))
        initial = [_I64(0), read, *states, *masks, *[_all(0)] * count]
        build.branch(loop)
        build.position_at_end(loop)
        phis = [build.phi(value.type) for value in initial]
        lanes, masks, odd = (phis[2 + count * part :][:count] for part in range(3))
        here = build.add(to, build.mul(phis[0], _I64(LINE)))
        lanes, slots, read = self.row(lanes, [self._contexts(mask) for mask in masks], phis[1], here)
        masks = [build.lshr(mask, _all(1)) for mask in masks]
        odd = [build.xor(one, slot) for one, slot in zip(odd, slots, strict=True)]
        after = build.add(phis[0], _I64(1))
        for phi, start, value in zip(phis, initial, (after, read, *lanes, *masks, *odd), strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        build.cbranch(build.icmp_signed("<", after, _I64(BLOCK - 1)), loop, end)
        build.position_at_end(end)
        contexts = [self._contexts(mask, parity) for mask, parity in zip(masks, odd, strict=True)]
        lanes, _, read = self.row(lanes, contexts, read, build.add(to, _I64(LINE * (BLOCK - 1))))
        return lanes, read

    def _contexts(self, masks: Any, odd: Any = None) -> Any:
        """4096 times the contexts of the lowest bits of masks, and of bit 1 of what is odd: parities of symbols."""
        build = self.build
        contexts = build.and_(build.shl(masks, _all(PRECISION)), _all(SLOTS))
        if odd is None:
            return contexts
        known = build.and_(build.shl(odd, _all(PRECISION)), _all(2 * SLOTS))
        return build.add(build.or_(contexts, known), _all(2 * SLOTS))

    def row(self, states: list[Any], contexts: list[Any], read: Any, to: Any) -> tuple[list[Any], list[Any], Any]:
        """One symbol from each lane, and a word of the stream where its state needs one.

        Args:
            states: vectors.
            contexts: 4096 times the context of each lane, vectors.
            read: words read so far.
            to: address of the codes of the row.

        Returns:
            The states, what the slots said, and how many words have been read.
        """
        build, slots, left = self.build, [], []
        for number, state in enumerate(states):
            at = build.and_(state, _all(SLOTS - 1))
            slots.append(self._look_up(build.or_(at, contexts[number])))
        for number, (slot, state) in enumerate(zip(slots, states, strict=True)):
            place = build.and_(build.lshr(slot, _all(8)), _all(SLOTS - 1))
            product = build.mul(build.lshr(slot, _all(8 + PRECISION)), build.lshr(state, _all(PRECISION)))
            after = build.add(product, place)
            small = build.icmp_unsigned("<", after, _all(1 << 16))
            words, count = self._words(read, small)
            left.append(build.select(small, build.or_(build.shl(after, _all(16)), words), after))
            read = build.add(read, count)
            code = build.trunc(slot, ir.VectorType(_I8, _WIDTH))
            address = build.add(to, _I64(_WIDTH * number))
            build.store(code, build.inttoptr(address, code.type.as_pointer())).align = 1
        return left, slots, read

    def _look_up(self, at: Any) -> Any:
        """[16] numbers of the table."""
        build, pointer = self.build, _I8.as_pointer()
        base = build.bitcast(self.table, pointer)
        if self.gathers and self.wide:
            mask = ir.Constant(ir.VectorType(ir.IntType(1), _WIDTH), [1] * _WIDTH)
            return self._call("llvm.x86.avx512.mask.gather.dpi.512", _LANE, _all(0), base, at, mask, _I32(4))
        if self.gathers:
            half, name = ir.VectorType(_I32, 8), "llvm.x86.avx2.gather.d.d.256"
            zeros, mask = ir.Constant(half, None), ir.Constant(half, [-1] * 8)
            indices = [self._some(at, range(first, first + 8)) for first in (0, 8)]
            parts = [self._call(name, half, zeros, base, index, mask, _I8(4)) for index in indices]
            return build.shuffle_vector(*parts, _places(range(_WIDTH)))
        out = ir.Constant(_LANE, ir.Undefined)
        for lane in range(_WIDTH):
            place = build.zext(build.extract_element(at, _I32(lane)), _I64)
            out = build.insert_element(out, build.load(build.gep(self.table, [place])), _I32(lane))
        return out

    def _words(self, read: Any, small: Any) -> tuple[Any, Any]:
        """The next words of the stream for the lanes that need one, and how many these are."""
        build, parts, total = self.build, [], _I64(0)
        size = _WIDTH if self.wide else 8
        for first in range(0, _WIDTH, size):
            some = small if self.wide else self._some(small, range(first, first + size))
            bits = build.bitcast(some, ir.IntType(size))
            place = build.gep(self.stream, [build.add(read, total)])
            loaded = build.load(build.bitcast(place, ir.VectorType(_I16, size).as_pointer()))
            loaded.align = 1
            numbers = build.zext(loaded, ir.VectorType(_I32, size))
            parts.append(self._spread(numbers, some, bits))
            total = build.add(total, build.zext(build.ctpop(bits), _I64))
        return parts[0] if self.wide else build.shuffle_vector(*parts, _places(range(_WIDTH))), total

    def _spread(self, numbers: Any, some: Any, bits: Any) -> Any:
        """The first numbers to those lanes that are among some."""
        build, kind = self.build, numbers.type
        if self.wide:
            return self._call("llvm.x86.avx512.mask.expand.v16i32", kind, numbers, ir.Constant(kind, None), some)
        order = build.load(build.gep(self.orders, [build.zext(bits, _I64)]))
        order.align = 8
        return self._call("llvm.x86.avx2.permd", kind, numbers, build.zext(order, kind))

    def _call(self, name: str, result: Any, *given: Any) -> Any:
        kind = ir.FunctionType(result, [value.type for value in given])
        return self.build.call(cgutils.get_or_insert_function(self.build.module, kind, name), given)

    def _some(self, vector: Any, places: range) -> Any:
        return self.build.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), _places(places))


def _places(places: range) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(places)), list(places))


def _blocks(vectors: int) -> Callable[..., Any]:
    """Make the decoding of a block in each lane, 16 for each vector.

    The function takes the addresses of the states [lanes] uint32, which are changed, of the masks of the blocks
    [lanes] uint32, of the table, the stream and the orders as in `decode`, how many words have been read, and the
    address of the first row of the codes at hand. It returns how many words have been read then.
    """

    @intrinsic
    def decoded(
        _typing: Any, _states: Any, _masks: Any, _table: Any, _stream: Any, _orders: Any, _read: Any, _to: Any
    ) -> Any:
        def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
            states, masks, *tables, read, to = values

            def places(address: Any) -> list[Any]:
                steps = [build.add(address, _I64(4 * _WIDTH * number)) for number in range(vectors)]
                return [build.inttoptr(step, _LANE.as_pointer()) for step in steps]

            first, bits = ([_unaligned(build, place) for place in places(address)] for address in (states, masks))
            left, count = _Lanes(context, build, *tables).block(first, bits, read, to)
            for place, state in zip(places(states), left, strict=True):
                build.store(state, place).align = 4
            return count

        return types.uint64(*[types.uint64] * 7), generate

    return decoded


def _unaligned(build: Any, place: Any) -> Any:
    value = build.load(place)
    value.align = 4
    return value


_16_blocks, _64_blocks = (_blocks(lanes // _WIDTH) for lanes in LANES)


@intrinsic
def _has_vectors(_typing: Any) -> Any:
    """Whether the processor that is compiled for can spread words."""

    def generate(context: Any, _build: Any, _signature: Any, _values: Any) -> Any:
        return ir.Constant(ir.IntType(1), int("+avx2" in features(context)))

    return types.boolean(), generate


@intrinsic
def _copy_line(_typing: Any, source: Any, to: Any) -> Any:
    """64 bytes from one address to another."""

    def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
        line = ir.VectorType(_I8, LINE).as_pointer()
        value = build.load(build.inttoptr(values[0], line))
        value.align = 1
        build.store(value, build.inttoptr(values[1], line)).align = 1
        return context.get_dummy_value()

    return types.void(source, to), generate


@kernel
def _write(held: Array, first: int, count: int, out: Array) -> None:
    """The codes at hand, of ``count`` blocks from ``first`` on, to the matrix."""
    columns = out.shape[1]
    flat = out.reshape(-1)
    done = 0
    while done < count:
        top, column = (first + done) // columns * BLOCK, (first + done) % columns
        width = min(count - done, columns - column)
        for row in range(BLOCK):
            to = (top + row) * columns + column
            if width == LINE:
                _copy_line(np.uint64(held.ctypes.data + row * LINE), np.uint64(flat.ctypes.data + to))
            else:
                for i in range(width):
                    flat[to + i] = held[row, done + i]
        done += width


@kernel
def _orders() -> Array:
    """[256, 8]: for each set of eight lanes, which word of those that follow is for each of them."""
    out = np.zeros((256, 8), np.uint8)
    for number in range(256):
        for lane in range(7):
            out[number, lane + 1] = out[number, lane] + np.uint8(number >> lane & 1)
    return out


@kernel
def _set_masks(words: Array, first: int, masks: Array) -> None:
    """The masks of some blocks, from words of six bits each; four of them are three bytes."""
    for four in range(masks.size // 4):
        at = first // 4 * 3 + 3 * four
        packed = (
            np.uint32(words[at]) | np.uint32(words[at + 1]) << np.uint32(8) | np.uint32(words[at + 2]) << np.uint32(16)
        )
        for lane in range(4):
            masks[4 * four + lane] = MASKS[packed >> np.uint32(6 * lane) & np.uint32(63)]


@kernel
def _six_contexts(table: Array) -> Array:
    """The table with codes ``2 m + c`` in place of the symbols m; one context is six equal ones, and m stays."""
    out = np.empty(6 * SLOTS, np.uint32)
    for number in range(out.size):
        entry = table[number % table.size]
        m = entry & np.uint32(255)
        code = np.uint8(2 * m + np.uint32(number // SLOTS & 1)) if table.size > SLOTS else np.uint8(m)
        out[number] = entry & np.uint32(0xFFFFFF00) | np.uint32(code)
    return out


@kernel
def decode(words: Array, stream: Array, states: Array, table: Array, out: Array) -> tuple[int, int]:
    """Decode whole blocks, one in each lane; changes the states.

    Returns how many blocks were decoded, and how many words of the stream were read, more than there are where it is
    damaged: none of either where the processor has no such instructions.

    Args:
        words: [n] uint8, those of the lattice, six bits each; of no length for one context.
        stream: [2 n] uint8, little-endian words of 16 bits.
        states: [16 or 64] uint32.
        table: from `rans.decoding_table`, of one context or of six; with six, symbols are from -64 to 63.
        out: [O, I] int8: ``2 m + c`` for six contexts, and m for one.
    """
    if not _has_vectors():
        return 0, 0
    lattice, lanes, end = words.size > 0, states.size, stream.size // 2
    codes = _six_contexts(table)
    orders, held, masks = _orders(), np.empty((BLOCK, LINE), np.int8), np.zeros(lanes, np.uint32)
    where = (np.uint64(states.ctypes.data), np.uint64(masks.ctypes.data), np.uint64(codes.ctypes.data))
    place, order, to = np.uint64(stream.ctypes.data), np.uint64(orders.ctypes.data), np.uint64(held.ctypes.data)
    needed = BLOCK * lanes + _WIDTH  # words that may be looked at for one block in each lane
    rest, before = np.zeros(4 * needed, np.uint8), np.int64(0)  # the last words, with zeros after them
    blocks, block, count, read = out.shape[0] // BLOCK * out.shape[1], 0, 0, np.uint64(0)
    while block + lanes <= blocks and before + np.int64(read) <= end:
        if place == np.uint64(stream.ctypes.data) and np.int64(read) + needed > end:
            before = np.int64(read)
            rest[: 2 * (end - before)] = stream[2 * before : 2 * end]
            place, read = np.uint64(rest.ctypes.data), np.uint64(0)
        here = to + np.uint64(count)
        if lattice:
            _set_masks(words, block, masks)
        if lanes == 64:
            read = _64_blocks(where[0], where[1], where[2], place, order, read, here)
        else:
            read = _16_blocks(where[0], where[1], where[2], place, order, read, here)
        block, count = block + lanes, count + lanes
        if count == LINE:
            _write(held, block - count, count, out)
            count = 0
    _write(held, block - count, count, out)
    return block, int(before) + int(read)
