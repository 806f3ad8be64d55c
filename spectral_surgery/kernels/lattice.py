"""Points of a lattice in 32 dimensions: which there are; `nearest` finds the cheapest one near some coefficients.

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


def nearest_reference(values: Floats, inverse: Floats, costs: Floats) -> Ints:
    """What `nearest.nearest` finds, by trying all words: [height, I] to [height, I] int64. Slow."""
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
