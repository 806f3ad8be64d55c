"""Inner loops in vector instructions of whatever processor compiles them: sums of levels times numbers, levels as such.

LLVM finds the instruction that multiplies pairs of int16 and adds them (``vpmaddwd``, ``vpdpwssd``) in some loops and
not in others, and then they take twenty times as long. So the inner loop is written as LLVM's vectors. These are of any
width: processors without such vectors get the same sums from narrower ones.

Numbers x are in chunks: for each chunk of `width()` terms, those of all tokens of a group follow each other. With
nibbles, a chunk has the terms of all low ones, and then those of all high ones. The last chunk ends where the
row ends; terms that the chunk before has too are zero in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from spectral_surgery.kernels.compile import features, intrinsic, is_amd, prefetch

BYTES, NIBBLES, POINTS, FIVE = range(4)  # kinds of levels; see `dots`
INT8, FLOAT32 = range(2)  # kinds of numbers; see `rows_of`
TOKENS = 4  # of a group; a token that is left over is one by itself
SPAN = 64  # float32 that `add_row_times` adds up at once: as many registers as hide how long an addition takes

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_AHEAD = 4096  # bytes: Intel's look ahead within a page; int8 took .9 of bfloat16's time without it, .65 with it
_WIDE, _NARROW = 32, 16  # int16 in a register
_STEPS = 4  # chunks of a row that are added up at a time for one token
_HIGH, _LOW = 4, 2  # rows at once, as many as leave registers for four tokens
TILES = 4  # of which `SPAN` sums each fit the registers of AVX-512


def _is_wide(context: Any) -> bool:
    return "+avx512bw" in features(context)


@intrinsic
def width(_typing: Any) -> Any:
    """Terms of a chunk, a constant of the processor."""
    return types.int64(), lambda context, *_: ir.Constant(_I64, _WIDE if _is_wide(context) else _NARROW)


@intrinsic
def height(_typing: Any) -> Any:
    """Rows that are multiplied at once, a constant of the processor."""
    return types.int64(), lambda context, *_: ir.Constant(_I64, _HIGH if _is_wide(context) else _LOW)


def dots(kind: int, tokens: int) -> Callable[..., None]:
    """Make the product of rows with a group of tokens: of `height()` rows, or of one row with one token.

    Several rows at once need fewer loads of x. From memory, one stream arrives faster than several.

    The function takes the addresses of the levels of the first row and of their lowest bits, the bytes of a row of
    levels, at least one chunk, the addresses of the numbers x and of the sums, [tokens, rows] float32, which are
    written, and parts and shift.

    Every sum is one of int32, and must not go beyond it in any term of a vector: see `few_tokens.largest`.

    Args:
        kind: BYTES for int8 levels. NIBBLES for two levels in a byte, the low nibbles for the first half of a row.
            POINTS for nibbles q that stand for parts * q + shift * sign(q). FIVE for nibbles that are the upper four
            bits of a level; bits of the first half of a row, and then of the second, are its lowest.
        tokens: 1 or `TOKENS`.
    """

    @intrinsic
    def product(
        _typing: Any, _levels: Any, _lowest: Any, _size: Any, _x: Any, _sums: Any, _parts: Any, _shift: Any
    ) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
            _Vectors(context, builder, kind, tokens).write_sums(*arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return product


def rows_of(kind: int, result: int) -> Callable[..., None]:
    """Make the reading of a row of levels as numbers.

    The function takes the addresses of the levels of the row and of their lowest bits, the bytes of the row, at least
    one chunk, parts and shift, as `dots` does, and the address of the numbers, which are written: all levels of a byte
    each, so that there are an even number where these are two.

    Args:
        kind: of levels, as for `dots`.
        result: INT8 or FLOAT32.
    """

    @intrinsic
    def read(_typing: Any, _levels: Any, _lowest: Any, _size: Any, _parts: Any, _shift: Any, _out: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
            _Vectors(context, builder, kind).write_row(result, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return read


class _Vectors:
    """Writes loops over the chunks of rows."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kind: int, tokens: int = 1) -> None:
        self.builder, self.features = builder, features(context)
        self.kind, self.tokens, self.halves = kind, tokens, 1 if kind == BYTES else 2
        # AMD's look ahead further than that: int8 took .57 of bfloat16's time on Zen 4, and .70 where it was asked
        self.asks_ahead = tokens == 1 and not is_amd(context)
        self.rows = 1 if tokens == 1 else _HIGH if _is_wide(context) else _LOW
        self.width = _WIDE if _is_wide(context) else _NARROW
        self.sum_type = ir.VectorType(_I32, self.width // 2)

    def write_row(self, result: int, levels: Any, lowest: Any, size: Any, parts: Any, shift: Any, out: Any) -> None:
        """See `rows_of`."""
        build = self.builder
        entry, loop, end = build.basic_block, build.append_basic_block("chunks"), build.append_basic_block("read")
        grid = [self._splat(build.trunc(number, _I16)) for number in (parts, shift)]
        last, each = build.sub(size, _number(self.width)), 4 if result == FLOAT32 else 1
        build.branch(loop)
        build.position_at_end(loop)
        at = build.phi(_I64)
        first = build.select(build.icmp_signed("<", at, last), at, last)
        bits = build.add(lowest, build.lshr(first, _number(3)))
        places = [bits, build.add(bits, build.lshr(size, _number(3)))]
        for half, factors in enumerate(self._levels(build.add(levels, first), places, *grid)):
            start = build.add(first, build.mul(size, _number(half)))
            kind = ir.VectorType(_F32 if result == FLOAT32 else _I8, self.width)
            numbers = build.sitofp(factors, kind) if result == FLOAT32 else build.trunc(factors, kind)
            to = build.inttoptr(build.add(out, build.mul(start, _number(each))), numbers.type.as_pointer())
            build.store(numbers, to).align = 1
        after = build.add(at, _number(self.width))
        at.add_incoming(_number(0), entry)
        at.add_incoming(after, loop)
        build.cbranch(build.icmp_signed("<", after, size), loop, end)
        build.position_at_end(end)

    def write_sums(self, levels: Any, lowest: Any, size: Any, x: Any, sums: Any, parts: Any, shift: Any) -> None:
        """See `dots`."""
        build, at = self.builder, _number(0)
        grid = [self._splat(build.trunc(number, _I16)) for number in (parts, shift)]
        count = self.rows * self.tokens * (_STEPS * self.halves if self.tokens == 1 else 1)
        totals, row = [ir.Constant(self.sum_type, None)] * count, (levels, lowest, size, *grid)
        if self.tokens == 1:  # one addition would wait for the other, and steps of a loop take time as well
            whole = build.mul(build.sdiv(size, _number(self.width * _STEPS)), _number(self.width * _STEPS))
            at, x, totals = self._add_chunks(row, _STEPS, (at, x, totals), whole)
        _, _, totals = self._add_chunks(row, 1, (at, x, totals), size)
        kept = [
            reduce(build.add, totals[number :: self.rows * self.tokens]) for number in range(self.rows * self.tokens)
        ]
        kept = [kept[row * self.tokens + token] for token in range(self.tokens) for row in range(self.rows)]
        if len(kept) == 1:
            build.store(self._total(kept[0]), build.inttoptr(sums, _F32.as_pointer()))
        else:
            together = self._totals(kept)
            build.store(together, build.inttoptr(sums, together.type.as_pointer())).align = 4

    def _add_chunks(self, row: Any, steps: int, state: Any, end: Any) -> Any:
        """A loop over chunks up to ``end``, several at a time; one at a time, the last one ends with the row.

        Args:
            row: levels, lowest, size, parts and shift.
            steps: chunks at a time.
            state: where to begin in the row, and in x, and the sums so far; what is returned is these afterwards.
        """
        build, (levels, lowest, size, *grid) = self.builder, row
        before, loop, done = (build.basic_block, build.append_basic_block("chunks"), build.append_basic_block("sums"))
        build.cbranch(build.icmp_signed("<", state[0], end), loop, done)
        build.position_at_end(loop)
        at, place, *totals = phis = [build.phi(value.type) for value in (*state[:2], *state[2])]
        totals, last = list(totals), build.sub(size, _number(self.width))
        for step in range(steps):
            first = build.add(at, _number(step * self.width))
            if steps == 1:
                first = build.select(build.icmp_signed("<", first, last), first, last)
            numbers = self._numbers(build.add(place, _number(2 * step * self.width * self.tokens * self.halves)))
            for number in range(self.rows):
                for half, factors in enumerate(self._levels_of(number, first, levels, lowest, size, grid)):
                    for token in range(self.tokens):
                        chain = step * self.halves + half if self.tokens == 1 else number * self.tokens + token
                        totals[chain] = build.add(totals[chain], self._pairs(factors, numbers[half][token]))
        after = [
            build.add(at, _number(self.width * steps)),
            build.add(place, _number(2 * self.width * self.tokens * self.halves * steps)),
            *totals,
        ]
        build.cbranch(build.icmp_signed("<", after[0], end), loop, done)
        build.position_at_end(done)
        results = [build.phi(phi.type) for phi in phis]
        for phi, result, initial, following in zip(phis, results, (*state[:2], *state[2]), after, strict=True):
            for one, block in ((phi, before), (result, before)):
                one.add_incoming(initial, block)
            for one, block in ((phi, loop), (result, loop)):
                one.add_incoming(following, block)
        return results[0], results[1], results[2:]

    def _numbers(self, place: Any) -> list[list[Any]]:
        """Numbers x of a chunk, by half and token."""
        return [
            [
                self._load(self.builder.add(place, _number(2 * self.width * (half * self.tokens + token))), _I16, 2)
                for token in range(self.tokens)
            ]
            for half in range(self.halves)
        ]

    def _levels_of(self, row: int, first: Any, levels: Any, lowest: Any, size: Any, grid: list[Any]) -> list[Any]:
        """Levels of a chunk of one of the rows, from its first term on."""
        build = self.builder
        eight = build.lshr(size, _number(3))  # bytes of the lowest bits of half a row
        start = build.add(build.add(levels, build.mul(size, _number(row))), first)
        bits = build.add(build.add(lowest, build.mul(eight, _number(2 * row))), build.lshr(first, _number(3)))
        return self._levels(start, [bits, build.add(bits, eight)], *grid)

    def _levels(self, address: Any, bits: list[Any], parts: Any, shift: Any) -> list[Any]:
        """Levels of a chunk of a row, int16: one vector, or those of the low and of the high nibbles."""
        build = self.builder
        if self.asks_ahead:
            prefetch(build, build.add(address, _number(_AHEAD)))
        both = build.sext(self._load(address, _I8, 1), ir.VectorType(_I16, self.width))
        if self.kind == BYTES:
            return [both]
        low = build.shl(both, self._all(12))
        if self.kind == FIVE:
            doubles = [build.ashr(low, self._all(11)), build.ashr(build.and_(both, self._all(-16)), self._all(3))]
            return [build.or_(double, self._bits(place)) for double, place in zip(doubles, bits, strict=True)]
        codes = [build.ashr(low, self._all(12)), build.ashr(both, self._all(4))]
        if self.kind == NIBBLES:
            return codes
        signs = [
            build.or_(build.ashr(code, self._all(15)), build.lshr(build.neg(code), self._all(15))) for code in codes
        ]
        return [
            build.add(build.mul(code, parts), build.mul(sign, shift)) for code, sign in zip(codes, signs, strict=True)
        ]

    def _bits(self, address: Any) -> Any:
        """A bit for each term, the lowest bit of a byte first: int16."""
        build, number = self.builder, ir.IntType(self.width)
        word = build.load(build.inttoptr(address, number.as_pointer()))
        word.align = 1
        return build.zext(
            build.bitcast(word, ir.VectorType(ir.IntType(1), self.width)), ir.VectorType(_I16, self.width)
        )

    def _all(self, value: int) -> Any:
        return ir.Constant(ir.VectorType(_I16, self.width), [value] * self.width)

    def _pairs(self, left: Any, right: Any) -> Any:
        """Products of int16, two neighbours added up: int32."""
        build, name = self.builder, None
        if self.width == _WIDE:
            name = "llvm.x86.avx512.pmaddw.d.512"
        elif "+avx2" in self.features:
            name = "llvm.x86.avx2.pmadd.wd"
        if name is None:
            even, odd = (build.mul(self._every_other(left, first), self._every_other(right, first)) for first in (0, 1))
            return build.add(even, odd)
        kind = ir.FunctionType(self.sum_type, [left.type, right.type])
        return build.call(cgutils.get_or_insert_function(build.module, kind, name), [left, right])

    def _every_other(self, vector: Any, first: int) -> Any:
        return self.builder.sext(self._some(vector, list(range(first, self.width, 2))), self.sum_type)

    def _total(self, vector: Any) -> Any:
        """Sum of a vector of int32 as float32, since an int32 would not hold it; in the order of `_totals`."""
        build = self.builder
        total = build.sitofp(vector, ir.VectorType(_F32, self.width // 2))
        for apart in (2, 1, 2, 1) if self.width == _WIDE else (2, 1, 1):
            low = [place for place in range(total.type.count) if not place & apart]
            total = build.fadd(self._some(total, low), self._some(total, [place + apart for place in low]))
        return build.extract_element(total, ir.Constant(_I32, 0))

    def _totals(self, vectors: list[Any]) -> Any:
        """Sums of as many vectors as one has numbers, as one vector: with every step half as many are left."""
        build, count = self.builder, self.width // 2
        totals = [build.sitofp(vector, ir.VectorType(_F32, count)) for vector in vectors]
        four, two = [0, count, 1, count + 1], [0, 1, count, count + 1]
        steps = [([at + place for at in range(0, count, 4) for place in low], 2) for low in (four, two)]
        if self.width == _WIDE:  # and now fours
            steps += [(_fours(0, 1, 4, 5), 8), (_fours(0, 2, 4, 6), 4)]
        else:
            steps += [(_fours(0, 2), 4)]
        for low, apart in steps:
            low_mask, high_mask = _places(low), _places([place + apart for place in low])
            totals = [
                build.fadd(build.shuffle_vector(*pair, low_mask), build.shuffle_vector(*pair, high_mask))
                for pair in zip(totals[::2], totals[1::2], strict=True)
            ]
        return totals[0]

    def _some(self, vector: Any, places: list[int]) -> Any:
        return self.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), _places(places))

    def _load(self, address: Any, element: Any, align: int) -> Any:
        pointer = self.builder.inttoptr(address, ir.VectorType(element, self.width).as_pointer())
        vector = self.builder.load(pointer)
        vector.align = align
        return vector

    def _splat(self, number: Any) -> Any:
        empty = ir.Constant(ir.VectorType(number.type, self.width), ir.Undefined)
        one = self.builder.insert_element(empty, number, ir.Constant(_I32, 0))
        return self._some(one, [0] * self.width)


@intrinsic
def tiles_at_once(_typing: Any) -> Any:
    """Tiles that `add_rows_times` takes at once, a constant of the processor."""
    return types.int64(), lambda context, *_: ir.Constant(_I64, TILES if _is_wide(context) else 1)


def _rows_times(count: int | None) -> Callable[..., None]:
    """Make sums over i of row[i] matrix[i, j], for `SPAN` of the j: tiles of activations times a transform.

    The function takes addresses of float32: of the rows [count, points], the matrix [points, points], and the sums
    [count, points], of which those from ``start`` on are written.

    Args:
        count: of rows; None for `tiles_at_once`.
    """

    @intrinsic
    def multiply(_typing: Any, _rows: Any, _matrix: Any, _points: Any, _start: Any, _out: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
            _write_rows_times(builder, count or (TILES if _is_wide(context) else 1), *arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return multiply


add_row_times, add_rows_times = _rows_times(1), _rows_times(None)


def _write_rows_times(
    build: ir.IRBuilder, count: int, rows: Any, matrix: Any, points: Any, start: Any, out: Any
) -> None:
    vector = ir.VectorType(_F32, SPAN)
    entry, loop, end = build.basic_block, build.append_basic_block("terms"), build.append_basic_block("stored")
    line, offset = build.mul(points, _number(4)), build.mul(start, _number(4))
    places = [build.add(rows, build.mul(line, _number(row))) for row in range(count)]
    build.branch(loop)
    build.position_at_end(loop)
    term, *totals = phis = [build.phi(_I64), *[build.phi(vector) for _ in range(count)]]
    weights = build.add(build.add(matrix, build.mul(term, line)), offset)
    numbers = build.load(build.inttoptr(weights, vector.as_pointer()))
    numbers.align = 4
    fused = cgutils.get_or_insert_function(
        build.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{SPAN}f32"
    )
    empty, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, SPAN), None)
    added, byte = [], build.mul(term, _number(4))
    for place, total in zip(places, totals, strict=True):
        value = build.load(build.inttoptr(build.add(place, byte), _F32.as_pointer()))
        spread = build.shuffle_vector(build.insert_element(empty, value, ir.Constant(_I32, 0)), empty, first)
        added.append(build.call(fused, [spread, numbers, total]))
    after = build.add(term, _number(1))
    nothing = [_number(0), *[ir.Constant(vector, None)] * count]
    for phi, initial, following in zip(phis, nothing, [after, *added], strict=True):
        phi.add_incoming(initial, entry)
        phi.add_incoming(following, loop)
    build.cbranch(build.icmp_signed("<", after, points), loop, end)
    build.position_at_end(end)
    for row, total in enumerate(added):
        to = build.add(build.add(out, build.mul(line, _number(row))), offset)
        build.store(total, build.inttoptr(to, vector.as_pointer())).align = 4


def _fours(*numbers: int) -> list[int]:
    """Places of four numbers that follow each other, by which four it is."""
    return [4 * number + place for number in numbers for place in range(4)]


def _places(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(places)), places)


def _number(value: int) -> Any:
    return ir.Constant(_I64, value)
