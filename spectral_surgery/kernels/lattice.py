"""Points of a lattice in 32 dimensions: which there are, and the cheapest one near a block of coefficients.

A point is ``l = 2 m + c``: c is one of the 64 words of the Reed-Muller code RM(1, 5), which are the affine functions of
the bits of a position, and the m of a whole block add up to an even number. At equal rate the rounding error is 0.16
bit below that of rounding each number by itself, of the 0.25 bit that this loses against the bound. A block of k < 32
rows has the first k positions of the words of RM(1, ceil(log2 k)), and any m. Sources: E. S. Barnes and G. E. Wall,
J. Austral. Math. Soc. 1 (1959); J. H. Conway and N. J. A. Sloane, Sphere Packings, Lattices and Groups, chapters 5, 6.

A word is numbered by its bits: bit 0 is c at position 0, and bit k + 1 says whether c changes with bit k of the
position.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels import BLOCK
from spectral_surgery.kernels.compile import inlined, kernel

WORDS = 64

Ints = npt.NDArray[Any]
Floats = npt.NDArray[Any]

_LANES = 16  # blocks side by side: as many as a vector register holds of float32 on the widest processors
_FAR = np.float32(np.inf)
_LARGEST = np.float32(1 << 29)  # steps: what is farther out is taken for that


def word_bits(height: int) -> int:
    """Bits that number the words of a block of ``height`` rows, 1 to 32."""
    return 1 + (height - 1).bit_length()


def _masks() -> npt.NDArray[np.uint32]:
    positions = np.arange(BLOCK)
    out = np.zeros(WORDS, np.uint32)
    for word in range(WORDS):
        c = np.full(BLOCK, word & 1)
        for k in range(5):
            c ^= (word >> (k + 1)) & (positions >> k) & 1
        out[word] = np.bitwise_or.reduce(c.astype(np.uint32) << positions.astype(np.uint32))
    return out


MASKS = _masks()  # [64] uint32: bit i is c at position i


@kernel
def words_of(codes: Ints, words: Ints) -> bool:
    """The word of every block of codes; False as soon as one is not a point of the lattice.

    Args:
        codes: [O, I] integers.
        words: [blocks] uint8, written: those of whole blocks row by row, then those of the rows that are left.
    """
    rows, columns = codes.shape
    mask, odd = np.empty(columns, np.uint32), np.empty(columns, np.int32)
    for top in range(0, rows, BLOCK):
        height = min(BLOCK, rows - top)
        mask[:], odd[:] = 0, 0
        for i in range(height):
            for column in range(columns):  # row by row, as they lie in memory
                code = np.int32(codes[top + i, column])
                mask[column] |= np.uint32(code & 1) << np.uint32(i)
                odd[column] ^= code >> 1
        inside = np.uint32(0xFFFFFFFF) >> np.uint32(BLOCK - height)
        for column in range(columns):
            word = _word(mask[column], height)
            if (MASKS[word] & inside) != mask[column] or (height == BLOCK and odd[column] & 1):
                return False
            words[top // BLOCK * columns + column] = np.uint8(word)
    return True


@inlined
def _word(mask: Any, height: int) -> Any:
    """The word that has the bits of a mask at positions 0, 1, 2, 4, 8 and 16."""
    first = mask & np.uint32(1)
    word = first
    for k in range(5):
        if (1 << k) < height:
            word |= (((mask >> np.uint32(1 << k)) & np.uint32(1)) ^ first) << np.uint32(k + 1)
    return word


@inlined
def _candidates(
    values: Floats,
    start: int,
    count: int,
    inverse: Floats,
    costs: Floats,
    points: Ints,
    cost: Floats,
    odd: Ints,
    gap: Floats,
) -> None:
    """For every position of ``count`` blocks and each c: the best m of either parity, and what the other costs more.

    The two points around a value in each class of integers modulo 4 are tried. What the best m costs, whether it is
    odd, and the gap to the other go to row 2 i + c; the points to row 4 i + l mod 4.
    """
    peak = np.int32(costs.size - 1)
    quarter, four, span = np.float32(0.25), np.float32(4), np.int32(4)
    for i in range(values.shape[0]):
        for c in range(2):
            row = 2 * i + c
            for lane in range(count):
                value = values[i, start + lane] * inverse[start + lane]
                value = min(max(value, -_LARGEST), _LARGEST) - np.float32(c)
                base = (
                    np.floor(value * quarter) * four
                )  # np's: math's goes through 64 bits, and takes a third longer in all
                even = np.int32(base) + np.int32(c)
                away = value - base  # in [0, 4): even m are at 0 and 4, odd ones at -2 and 2 or at 2 and 6
                one = away * away + costs[min(abs(even), peak)]
                two = (away - four) * (away - four) + costs[min(abs(even + span), peak)]
                shift = np.float32(2) if away >= np.float32(2) else np.float32(-2)
                odd_low = even + np.int32(shift)
                three = (away - shift) * (away - shift) + costs[min(abs(odd_low), peak)]
                beyond = away - shift - four
                last = beyond * beyond + costs[min(abs(odd_low + span), peak)]
                points[4 * i + c, lane] = even if one <= two else even + span
                points[4 * i + c + 2, lane] = odd_low if three <= last else odd_low + span
                least, other = min(one, two), min(three, last)
                cost[row, lane] = min(least, other)
                odd[row, lane] = np.int32(other < least)
                gap[row, lane] = abs(other - least)


@inlined
def _combine(
    blocks: int,
    size: int,
    count: int,
    cost: Floats,
    odd: Ints,
    gap: Floats,
    to_cost: Floats,
    to_odd: Ints,
    to_gap: Floats,
) -> None:
    """Costs of the words of blocks of twice the positions: (u, u) and (u, not u) for every word u of half of them."""
    for block in range(blocks):
        for word in range(size):
            for change in range(2):
                left, right = 2 * block * size + word, (2 * block + 1) * size + (word ^ change)
                to = 2 * block * size + change * size + word
                for lane in range(count):
                    to_cost[to, lane] = cost[left, lane] + cost[right, lane]
                    to_odd[to, lane] = odd[left, lane] ^ odd[right, lane]
                    to_gap[to, lane] = min(gap[left, lane], gap[right, lane])


@inlined
def _best_words(
    size: int, count: int, whole: bool, cost: Floats, odd: Ints, gap: Floats, best: Floats, word: Ints
) -> None:
    for lane in range(count):
        best[lane], word[lane] = _FAR, 0
    for candidate in range(size):
        for lane in range(count):
            total = cost[candidate, lane] + (gap[candidate, lane] if whole and odd[candidate, lane] else np.float32(0))
            better = total < best[lane]
            best[lane] = total if better else best[lane]
            word[lane] = np.int32(candidate) if better else word[lane]


@inlined
def _write(
    mask: np.uint32, lane: int, uneven: bool, points: Ints, odd: Ints, gap: Floats, out: Ints, column: int
) -> None:
    """The point of a word: the best m of each position, and the other parity where this costs least if they are odd."""
    where, least = 0, _FAR
    for i in range(out.shape[0]):
        c = np.int64((mask >> np.uint32(i)) & np.uint32(1))
        row = 2 * i + c
        out[i, column] = points[4 * i + c + 2 * odd[row, lane], lane]
        if gap[row, lane] < least:
            where, least = i, gap[row, lane]
    if uneven:
        c = np.int64((mask >> np.uint32(where)) & np.uint32(1))
        out[where, column] = points[4 * where + c + 2 * (1 - odd[2 * where + c, lane]), lane]


@kernel
def nearest(values: Floats, inverse: Floats, costs: Floats, out: Ints) -> None:
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
    full = 1
    while full < height:
        full *= 2
    points = np.empty((4 * full, _LANES), np.int32)
    cost, odd, gap = (
        np.zeros((2 * full, _LANES), np.float32),
        np.zeros((2 * full, _LANES), np.int32),
        np.zeros((2 * full, _LANES), np.float32),
    )
    one = np.empty_like(cost), np.empty_like(odd), np.empty_like(gap)
    two = np.empty_like(cost), np.empty_like(odd), np.empty_like(gap)
    best, word = np.empty(_LANES, np.float32), np.empty(_LANES, np.int32)
    gap[2 * height :] = _FAR  # beyond the rows any c is free
    for start in range(0, columns, _LANES):
        count = min(_LANES, columns - start)
        _candidates(values, start, count, inverse, costs, points, cost, odd, gap)
        size, blocks, source, to, spare = 2, full // 2, (cost, odd, gap), one, two
        while blocks:
            _combine(blocks, size, count, source[0], source[1], source[2], to[0], to[1], to[2])
            source, to, spare = to, spare, to
            size, blocks = 2 * size, blocks // 2
        _best_words(size, count, height == BLOCK, source[0], source[1], source[2], best, word)
        for lane in range(count):
            uneven = height == BLOCK and source[1][word[lane], lane] & 1 == 1
            _write(MASKS[word[lane]], lane, uneven, points, odd, gap, out, start + lane)


def nearest_reference(values: Floats, inverse: Floats, costs: Floats) -> Ints:
    """What `nearest` finds, by trying all words: [height, I] to [height, I] int64. Slow."""
    height, columns = values.shape
    scaled = values.astype(np.float64) * inverse
    peak = len(costs) - 1
    out = np.zeros((height, columns), np.int64)
    for column in range(columns):
        best = math.inf
        for mask in MASKS[: 1 << word_bits(height)]:
            c = (int(mask) >> np.arange(height)) & 1
            value = scaled[:, column]
            m = np.floor((value - c) / 4)[:, None] * 2 + np.arange(4)  # two of either parity
            levels = 2 * m.astype(np.int64) + c[:, None]
            cost = np.square(value[:, None] - levels) + costs[np.minimum(np.abs(levels), peak)]
            even, odd = ((levels[:, p::2], cost[:, p::2]) for p in (0, 1))
            choice = [(pick[0][np.arange(height), pick[1].argmin(1)], pick[1].min(1)) for pick in (even, odd)]
            better = (choice[1][1] < choice[0][1]).astype(int)
            level = np.where(better, choice[1][0], choice[0][0])
            total = np.minimum(choice[0][1], choice[1][1])
            if height == BLOCK and better.sum() & 1:
                gaps = np.abs(choice[1][1] - choice[0][1])
                i = gaps.argmin()
                level[i] = choice[1 - better[i]][0][i]
                total = total.copy()
                total[i] += gaps[i]
            if total.sum() < best:
                best, out[:, column] = total.sum(), level
    return out
