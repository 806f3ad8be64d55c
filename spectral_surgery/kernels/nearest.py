"""The search for the cheapest point of the `lattice`, for sixteen blocks side by side, in LLVM's vectors.

For every position and each c, the best m of either parity is found once. Words of 2, 4, ... 32 positions are then put
together from those of half of them, as the words of the code are: (u, u) and (u, not u). `lattice.nearest_reference`
is the plain way to the same points, and a slow one.

Vectors are spelled out, since loops over sixteen numbers in several arrays were left as they were by the compiler, at
110 cycles a coefficient. They are of LLVM and of no processor: one of 512 bits is two of 256 where there are no others.
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
from spectral_surgery.kernels.lattice import MASKS, WORDS

Array = npt.NDArray[Any]

_LANES = 16
_FAR = np.float32(np.inf)
_LARGEST = np.float32(1 << 29)  # steps: what is farther out is taken for that
# one piece of memory, in bytes: rows of 16 numbers, and nodes of three rows, the cost, the gap and whether m is odd
_ROW = 4 * _LANES
_NODE = 3 * _ROW
_SCALED = 0  # [32] rows
_POINTS = _SCALED + BLOCK * _ROW  # [64, 2] rows, by 2 i + c: with m even, and odd
_FIRST = _POINTS + 2 * WORDS * _ROW  # [64] nodes, by 2 i + c
_SECOND, _THIRD = _FIRST + WORDS * _NODE, _FIRST + 2 * WORDS * _NODE  # [64] nodes
_BEST = _FIRST + 3 * WORDS * _NODE  # rows: the least cost, the bits of its word, and whether one m has to change
_LEAST = _BEST + 3 * _ROW  # rows: the least gap, and where it is
_CHOSEN = _LEAST + 2 * _ROW  # [32] rows
_SIZE = _CHOSEN + BLOCK * _ROW


class _Vectors:
    """Vectors of sixteen numbers, in memory that begins at an address."""

    def __init__(self, build: Any, space: Any) -> None:

        self.build = build
        self.word, self.half, single = ir.IntType(64), ir.IntType(32), ir.FloatType()
        self.space = build.inttoptr(space, ir.IntType(8).as_pointer())
        self.float, self.int = ir.VectorType(single, _LANES), ir.VectorType(self.half, _LANES)

    def load(self, kind: Any, offset: Any, more: int = 0) -> Any:
        """The row at an offset, in bytes."""
        return self.build.load(self._place(kind, offset, more))

    def store(self, value: Any, offset: Any, more: int = 0) -> None:
        """A row to an offset."""
        self.build.store(value, self._place(value.type, offset, more))

    def each(self, kind: Any, value: Any) -> Any:
        """A constant, or a number, in every lane."""
        if isinstance(value, int | float):
            return ir.Constant(kind, [kind.element(value)] * _LANES)
        one = self.build.insert_element(ir.Constant(kind, ir.Undefined), value, self.half(0))
        return self.build.shuffle_vector(one, one, ir.Constant(self.int, [0] * _LANES))

    def function(self, name: str, value: Any) -> Any:
        """One of LLVM's functions of sixteen floats."""
        kind = ir.FunctionType(self.float, [self.float])
        function = cgutils.get_or_insert_function(self.build.module, kind, f"llvm.{name}.v{_LANES}f32")
        return self.build.call(function, [value])

    def least(self, left: Any, right: Any) -> Any:
        """The lesser of two floats."""
        return self.build.select(self.build.fcmp_ordered("<", left, right), left, right)

    def _place(self, kind: Any, offset: Any, more: int) -> Any:
        place = self.build.gep(self.space, [self.build.add(offset, self.word(more))])
        return self.build.bitcast(place, kind.as_pointer())


def _looked_up(vectors: _Vectors, table: Any, rows: Any) -> list[Any]:
    """Four floats of each lane's row of a table, turned: one load a lane, where four gathers take far longer."""
    build, half = vectors.build, vectors.half
    four = ir.VectorType(ir.FloatType(), 4)
    source = build.inttoptr(table, four.as_pointer())

    def mixed(left: Any, right: Any, places: list[int]) -> Any:
        return build.shuffle_vector(left, right, ir.Constant(ir.VectorType(half, len(places)), places))

    lanes = []
    for lane in range(_LANES):
        row = build.sext(build.extract_element(rows, half(lane)), vectors.word)
        lanes.append(build.load(build.gep(source, [row])))
        lanes[-1].align = 4
    halves = []
    for start in (0, 8):  # two squares of four by four at a time
        pairs = [mixed(lanes[start + k], lanes[start + k + 4], list(range(8))) for k in range(4)]
        low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
        first, last = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        turned = [(mixed(pairs[0], pairs[1], half), mixed(pairs[2], pairs[3], half)) for half in (low, high)]
        halves.append([mixed(one, other, half) for one, other in turned for half in (first, last)])
    return [mixed(left, right, list(range(_LANES))) for left, right in zip(*halves, strict=True)]


@intrinsic
def _try(_typing: Any, space: Any, row: Any, c: Any, table: Any, reach: Any) -> Any:
    """The best m of either parity at one position, for one c, and what the other costs more.

    The two points around a value in each class of integers modulo 4 are tried.

    Args:
        space: address of the piece of memory.
        row: int64, 2 i + c.
        c: int32.
        table: address of the prices for c.
        reach: int32, see `_price_table`.
    """

    def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
        v = _Vectors(build, values[0])
        number, c = values[1], v.each(v.int, values[2])
        two, four = v.each(v.float, 2.0), v.each(v.float, 4.0)
        scaled = v.load(v.float, build.mul(build.lshr(number, v.word(1)), v.word(_ROW)), _SCALED)
        value = build.fsub(scaled, build.sitofp(c, v.float))
        base = build.fmul(v.function("floor", build.fmul(value, v.each(v.float, 0.25))), four)
        away = build.fsub(value, base)  # in [0, 4): even m are at 0 and 4, odd ones at -2 and 2 or at 2 and 6
        above = build.fcmp_ordered(">=", away, two)
        base = build.fptosi(base, v.int)
        place = build.add(build.ashr(base, v.each(v.int, 1)), build.zext(above, v.int))
        limit = v.each(v.int, values[4])
        place = build.select(build.icmp_signed(">", place, limit), limit, place)
        negative = build.neg(limit)
        place = build.select(build.icmp_signed("<", place, negative), negative, place)
        prices = _looked_up(v, values[3], build.add(place, limit))
        shift = build.select(above, two, v.each(v.float, -2.0))
        odd_away = build.fsub(away, shift)
        even = build.add(base, c)
        odd = build.add(even, build.select(above, v.each(v.int, 2), v.each(v.int, -2)))
        least = []
        for m, (start, point) in enumerate(((away, even), (odd_away, odd))):
            beyond = build.fsub(start, four)
            lower = build.fadd(build.fmul(start, start), prices[2 * m])
            upper = build.fadd(build.fmul(beyond, beyond), prices[2 * m + 1])
            below = build.fcmp_ordered("<=", lower, upper)
            chosen = build.select(below, point, build.add(point, v.each(v.int, 4)))
            v.store(chosen, build.mul(number, v.word(2 * _ROW)), _POINTS + m * _ROW)
            least.append(v.least(lower, upper))
        node = build.mul(number, v.word(_NODE))
        v.store(v.least(*least), node, _FIRST)
        v.store(v.function("fabs", build.fsub(least[1], least[0])), node, _FIRST + _ROW)
        v.store(build.zext(build.fcmp_ordered("<", least[1], least[0]), v.int), node, _FIRST + 2 * _ROW)
        return context.get_dummy_value()

    return types.void(space, row, c, table, reach), generate


@intrinsic
def _join(_typing: Any, space: Any, left: Any, right: Any, to: Any) -> Any:
    """The node of two words one after the other; offsets are in bytes."""

    def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
        v = _Vectors(build, values[0])
        for row, kind, join in ((0, v.float, build.fadd), (1, v.float, v.least), (2, v.int, build.xor)):
            v.store(join(*(v.load(kind, node, row * _ROW) for node in values[1:3])), values[3], row * _ROW)
        return context.get_dummy_value()

    return types.void(space, left, right, to), generate


@intrinsic
def _consider(_typing: Any, space: Any, node: Any, bits: Any, whole: Any) -> Any:
    """A word that may be the cheapest so far.

    Args:
        space: address of the piece of memory.
        node: offset of that of the word.
        bits: uint32 of `lattice.MASKS`.
        whole: int32, one where the m must add up to an even number, else zero.
    """

    def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
        v = _Vectors(build, values[0])
        zero = v.word(0)
        wrong = build.and_(v.load(v.int, values[1], 2 * _ROW), v.each(v.int, values[3]))
        extra = build.select(
            build.icmp_signed("!=", wrong, v.each(v.int, 0)), v.load(v.float, values[1], _ROW), v.each(v.float, 0.0)
        )
        total = build.fadd(v.load(v.float, values[1]), extra)
        better = build.fcmp_ordered("<", total, v.load(v.float, zero, _BEST))
        for row, value in enumerate((total, v.each(v.int, values[2]), wrong)):
            before = v.load(value.type, zero, _BEST + row * _ROW)
            v.store(build.select(better, value, before), zero, _BEST + row * _ROW)
        return context.get_dummy_value()

    return types.void(space, node, bits, whole), generate


@intrinsic
def _choose(_typing: Any, space: Any, position: Any) -> Any:
    """The points of the cheapest words at a position, int32, and the least gap so far."""

    def generate(context: Any, build: Any, _signature: Any, values: Any) -> Any:
        v = _Vectors(build, values[0])
        zero, position = v.word(0), build.trunc(values[1], v.half)
        bits = build.lshr(v.load(v.int, zero, _BEST + _ROW), v.each(v.int, position))
        one = build.icmp_signed("!=", build.and_(bits, v.each(v.int, 1)), v.each(v.int, 0))
        points, gaps = [], []
        for c in (0, 1):
            row = build.add(build.mul(values[1], v.word(2)), v.word(c))
            node, pair = build.mul(row, v.word(_NODE)), build.mul(row, v.word(2 * _ROW))
            odd = build.icmp_signed("!=", v.load(v.int, node, _FIRST + 2 * _ROW), v.each(v.int, 0))
            points.append(build.select(odd, v.load(v.int, pair, _POINTS + _ROW), v.load(v.int, pair, _POINTS)))
            gaps.append(v.load(v.float, node, _FIRST + _ROW))
        v.store(build.select(one, points[1], points[0]), build.mul(values[1], v.word(_ROW)), _CHOSEN)
        gap, before = build.select(one, gaps[1], gaps[0]), v.load(v.float, zero, _LEAST)
        nearer = build.fcmp_ordered("<", gap, before)
        v.store(build.select(nearer, gap, before), zero, _LEAST)
        where = v.load(v.int, zero, _LEAST + _ROW)
        v.store(build.select(nearer, v.each(v.int, position), where), zero, _LEAST + _ROW)
        return context.get_dummy_value()

    return types.void(space, position), generate


@kernel
def _price_table(costs: Array) -> Array:
    """What the points tried cost: [2, 2 n + 1, 4] float32, by c, and by which values are between them.

    Row n + q of c is for values from 2 q + c to 2 q + c + 2, of which the last ones are for all farther out: l around
    them with an even m, the lower and the upper one, and then those with an odd m.
    """
    peak = costs.size - 1
    reach = (peak + 8) // 2
    out = np.empty((2, 2 * reach + 1, 4), np.float32)
    for c in range(2):
        for q in range(-reach, reach + 1):
            even = (q >> 1) * 4 + c
            odd = even + (2 if q & 1 else -2)
            for k, level in enumerate((even, even + 4, odd, odd + 4)):
                out[c, q + reach, k] = costs[min(abs(level), peak)]
    return out


@kernel
def _words(space: Any, height: int, size: int) -> int:
    """Nodes of all words of ``size`` positions, from those of each; returns where they are."""
    source, to, spare, length, blocks = _FIRST, _SECOND, _THIRD, 2, size // 2
    while blocks:
        for block in range(blocks):
            for word in range(length):
                for change in range(2):
                    left, right = 2 * block * length + word, (2 * block + 1) * length + (word ^ change)
                    target = 2 * block * length + change * length + word
                    _join(space, source + _NODE * left, source + _NODE * right, to + _NODE * target)
        source, to, spare = to, spare, to
        length, blocks = 2 * length, blocks // 2
    whole = np.int32(height == BLOCK)
    for word in range(length):
        _consider(space, source + _NODE * word, MASKS[word], whole)
    return source


@kernel
def nearest(values: Array, inverse: Array, costs: Array, out: Array) -> None:
    """The cheapest point for each column of a matrix of one block of rows.

    What is minimal is the sum over positions of ``(inverse * value - l)^2 + costs[|l|]``, with the least cost over all
    words and all m of the lattice, but for the points tried: the two around a value in each class modulo 4.

    Args:
        values: [height, I] float32, 1 to 32 rows.
        inverse: [I] float32, one over the step of each column.
        costs: [n] float32, of a level of each magnitude, in squared steps; the last one is for all larger ones too.
        out: [height, I] int32, written.
    """
    height, columns = values.shape
    size = 1
    while size < height:
        size *= 2
    prices = _price_table(costs)
    reach, step = np.int32(prices.shape[1] // 2), 16 * prices.shape[1]
    memory = np.zeros(_SIZE + _ROW, np.uint8)
    start = -memory.ctypes.data % _ROW  # rows are lines of the cache
    space, floats = memory.ctypes.data + start, memory[start : start + _SIZE].view(np.float32).reshape(-1, _LANES)
    ints = floats.view(np.int32)
    for row in range(2 * height, 2 * size):  # beyond the rows any c is free
        floats[_FIRST // _ROW + 3 * row + 1] = _FAR
    for first in range(0, columns, _LANES):
        count = min(_LANES, columns - first)
        table = prices.ctypes.data  # asked for here, since memory is freed after the last use of its array
        for i in range(height):
            for lane in range(count):
                value = values[i, first + lane] * inverse[first + lane]
                value = value if value > -_LARGEST else -_LARGEST  # also where it is NaN
                floats[_SCALED // _ROW + i, lane] = value if value < _LARGEST else _LARGEST
        for row in range(2 * height):
            _try(space, row, np.int32(row & 1), table + (row & 1) * step, reach)
        floats[_BEST // _ROW], floats[_LEAST // _ROW] = _FAR, _FAR
        _words(space, height, size)
        for i in range(height):
            _choose(space, i)
        for lane in range(count):
            if ints[_BEST // _ROW + 2, lane]:
                i = ints[_LEAST // _ROW + 1, lane]
                row = 2 * i + (ints[_BEST // _ROW + 1, lane] >> i & 1)
                odd = ints[_FIRST // _ROW + 3 * row + 2, lane]
                ints[_CHOSEN // _ROW + i, lane] = ints[_POINTS // _ROW + 2 * row + 1 - odd, lane]
        for i in range(height):
            for lane in range(count):
                out[i, first + lane] = ints[_CHOSEN // _ROW + i, lane]
