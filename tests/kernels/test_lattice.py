"""The lattice: which integers are points of it, and the cheapest point near some numbers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spectral_surgery.kernels import BLOCK
from spectral_surgery.kernels.lattice import MASKS, WORDS, nearest_reference, word_bits, words_of
from spectral_surgery.kernels.nearest import nearest
from tests.support.codes import lattice_points

Array = npt.NDArray[Any]
FREE = np.zeros(1, np.float32)  # what levels cost: nothing
DEAR = (0.3 * np.log2(2 + np.arange(40))).astype(np.float32)


def point_near(values: Array, inverse: Array | None = None, costs: Array = FREE) -> Array:
    out = np.full(values.shape, 99, np.int32)
    nearest(values, np.ones(values.shape[1], np.float32) if inverse is None else inverse, costs, out)
    return out


def are_points(codes: Array) -> bool:
    return words_of(codes, np.empty(-(-codes.shape[0] // BLOCK) * codes.shape[1], np.uint8))


def cost(values: Array, levels: Array, costs: Array = FREE) -> Array:
    """Of each column, in float64."""
    price = costs.astype(np.float64)[np.minimum(np.abs(levels), len(costs) - 1)]
    return (np.square(values.astype(np.float64) - levels) + price).sum(0)


def numbers(height: int, columns: int, scale: float = 2.0) -> Array:
    rng = np.random.default_rng(height)
    return (scale * rng.standard_normal((height, columns))).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- members


def reed_muller(height: int) -> set[tuple[int, ...]]:
    """Words by their definition: values of affine functions of the bits of a position."""
    bits = max(height - 1, 0).bit_length()
    functions = itertools.product((0, 1), repeat=1 + bits)
    return {
        tuple((f[0] + sum(f[1 + k] * (i >> k & 1) for k in range(bits))) % 2 for i in range(height)) for f in functions
    }


@pytest.mark.parametrize("height", range(1, 33))
def test_words_are_those_of_the_code(height: int) -> None:
    words = {tuple(int(mask) >> i & 1 for i in range(height)) for mask in MASKS[: 1 << word_bits(height)]}
    assert words == reed_muller(height)
    assert len(words) == 1 << word_bits(height), "a number for each word"


def test_words_of_32_are_16_apart() -> None:
    assert len(MASKS) == WORDS == len(set(MASKS.tolist()))
    apart = {int(a ^ b).bit_count() for a, b in itertools.combinations(MASKS.tolist(), 2)}
    assert apart == {16, 32}


@pytest.mark.parametrize("height", range(1, 9))
def test_members_of_small_heights(height: int) -> None:
    """Of all vectors of some integers, those are points whose last bits are a word."""
    values = (-2, -1, 0, 1) if height < 6 else (-1, 2)
    vectors = np.array(list(itertools.product(values, repeat=height)), np.int32)
    code = reed_muller(height)
    members = 0
    for vector in vectors:
        wanted = tuple((vector & 1).tolist()) in code
        assert are_points(vector[:, None]) == wanted
        members += wanted
    assert members == len(vectors) * len(code) >> height


def test_members_of_whole_blocks() -> None:
    """With each word and with one bit changed, and with the sum of the m even and odd."""
    rng = np.random.default_rng(0)
    for number, mask in enumerate(MASKS.tolist()):
        c = (mask >> np.arange(BLOCK)) & 1
        m = rng.integers(-9, 9, BLOCK)
        m[3] += m.sum() & 1
        words = np.empty(1, np.uint8)
        assert words_of((2 * m + c)[:, None], words)
        assert words[0] == number
        assert are_points((2 * m + c - 4)[:, None])
        m[rng.integers(BLOCK)] += 1
        assert not are_points((2 * m + c)[:, None])
        m[0] += 1
        c[rng.integers(BLOCK)] ^= 1
        assert not are_points((2 * m + c)[:, None])


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 95])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_words_of_many_blocks(rows: int, dtype: Any) -> None:
    rng = np.random.default_rng(rows)
    codes = lattice_points(rng, (rows, 7), 10, dtype)
    assert are_points(codes)
    assert are_points(np.asfortranarray(codes))
    words = np.empty(-(-rows // BLOCK) * 7, np.uint8)
    words_of(codes, words)
    for block, word in enumerate(words):
        part = codes[block // 7 * BLOCK : block // 7 * BLOCK + BLOCK, block % 7]
        np.testing.assert_array_equal(part & 1, int(MASKS[word]) >> np.arange(len(part)) & 1)
        assert word < 1 << word_bits(len(part))
    if rows >= BLOCK:
        codes[BLOCK - 1, 6] += 2
        assert not are_points(codes)


# ------------------------------------------------------------------------------------------------------------- nearest


@pytest.mark.parametrize("costs", [FREE, DEAR], ids=["free", "dear"])
@pytest.mark.parametrize("height", range(1, 33))
def test_nearest_is_as_cheap_as_trying_every_word(height: int, costs: Array) -> None:
    values = numbers(height, 19)  # a full vector of columns and three more
    levels, wanted = point_near(values, costs=costs), nearest_reference(values, np.ones(19, np.float32), costs)
    assert are_points(levels)
    assert are_points(wanted)
    np.testing.assert_allclose(cost(values, levels, costs), cost(values, wanted, costs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("height", range(1, 6))
def test_nearest_is_the_nearest_of_all_points(height: int) -> None:
    """By trying all integers around, which the reference does not."""
    values = numbers(height, 40)
    base = np.floor(values).astype(np.int64)
    offsets = np.array(list(itertools.product(range(-1, 3), repeat=height)))
    levels, code = point_near(values), reed_muller(height)
    for column in range(40):
        near = base[:, column] + offsets
        members = np.array([tuple(row) in code for row in (near & 1).tolist()])
        least = np.square(near[members] - values[:, column]).sum(1).min()
        assert cost(values, levels)[column] == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33])
def test_columns_do_not_depend_on_each_other(columns: int) -> None:
    values = numbers(32, columns)
    inverse = np.linspace(0.5, 2, columns).astype(np.float32)
    together = point_near(values, inverse, DEAR)
    for column in range(columns):
        alone = point_near(values[:, column : column + 1], inverse[column : column + 1], DEAR)
        np.testing.assert_array_equal(together[:, column], alone[:, 0])


@pytest.mark.parametrize("height", [32, 20])
def test_values_need_not_be_contiguous(height: int) -> None:
    wide = numbers(height, 60)
    for values in (wide[:, ::3], wide[:, 20:37], np.asfortranarray(wide), wide[::-1], numbers(60, height).T):
        np.testing.assert_array_equal(
            point_near(values, costs=DEAR), point_near(np.ascontiguousarray(values), costs=DEAR)
        )
    out = np.zeros((height, 120), np.int32)
    nearest(wide, np.ones(60, np.float32), FREE, out[:, ::2])
    np.testing.assert_array_equal(out[:, ::2], point_near(wide))
    assert not out[:, 1::2].any()


@pytest.mark.parametrize("height", [1, 17, 32])
def test_zeros_are_zero(height: int) -> None:
    for costs in (FREE, DEAR):
        assert not point_near(np.zeros((height, 20), np.float32), costs=costs).any()
        assert not point_near(np.full((height, 20), 1e-30, np.float32), costs=costs).any()
        assert not point_near(np.full((height, 20), 1e-45, np.float32), costs=costs).any()


@pytest.mark.parametrize("height", [5, 32])
def test_extreme_values_and_steps(height: int) -> None:
    """Only their ratio matters."""
    values = numbers(height, 20)
    wanted = point_near(values)
    for factor in (2.0**100, 2.0**-100):
        scaled = (values * np.float32(factor)).astype(np.float32)
        np.testing.assert_array_equal(point_near(scaled, np.full(20, 1 / factor, np.float32)), wanted)
    one = np.zeros((height, 20), np.float32)
    one[2] = 1e30
    levels = point_near(one, np.full(20, 1e-30 * 1000, np.float32))
    assert are_points(levels)
    np.testing.assert_allclose(levels[2], 1000, atol=4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -3e38])
@pytest.mark.parametrize("height", [5, 32])
def test_what_no_integer_is_near_leaves_other_columns_alone(height: int, value: float) -> None:
    values = numbers(height, 40)
    values[height // 2, ::3] = value
    others = np.arange(40) % 3 > 0
    np.testing.assert_array_equal(point_near(values, costs=DEAR)[:, others], point_near(values[:, others], costs=DEAR))


@pytest.mark.parametrize("scale", [300.0, 1e5, 1e8])
def test_large_levels_are_points(scale: float) -> None:
    """Where float32 has no halves any more, the points still are some: those around, with the parity that belongs."""
    values = numbers(32, 20, scale)
    levels = point_near(values, costs=DEAR)
    assert are_points(levels)
    np.testing.assert_allclose(levels, values, atol=4 + 4e-7 * scale)


@pytest.mark.parametrize("known", [1, 2, 7, 60, 4096])
def test_levels_beyond_all_prices_have_the_last_one(known: int) -> None:
    """Prices that rise and fall, of fewer and of more levels than occur, and values on integers and between them."""
    costs = np.random.default_rng(known).uniform(0, 3, known).astype(np.float32)
    values = numbers(32, 40, 12.0)
    values[:, ::3] = np.rint(values[:, ::3] * 2) / 2
    levels, wanted = point_near(values, costs=costs), nearest_reference(values, np.ones(40, np.float32), costs)
    assert are_points(levels)
    np.testing.assert_allclose(cost(values, levels, costs), cost(values, wanted, costs), rtol=1e-5)


def test_points_stay_where_they_are() -> None:
    codes = lattice_points(np.random.default_rng(0), (32, 50), 8)
    np.testing.assert_array_equal(point_near(codes.astype(np.float32)), codes)


def test_levels_that_cost_are_avoided() -> None:
    values = numbers(32, 400)
    free, dear = point_near(values), point_near(values, costs=DEAR)
    assert np.abs(dear).sum() < np.abs(free).sum()
    assert cost(values, dear, DEAR).sum() < cost(values, free, DEAR).sum()
    assert cost(values, free).sum() < cost(values, dear).sum()


def test_the_error_is_that_of_the_lattice() -> None:
    """Of numbers spread evenly: 2^(27/16) times the second moment, which is below 1/12 of integers as dense."""
    values = np.random.default_rng(0).uniform(-64, 64, (32, 6000)).astype(np.float32)
    error = cost(values, point_near(values)).mean() / 32
    volume = 2.0 ** (2 * (32 + 1 - 6) / 32)  # of a point, as a square for each coefficient
    gain = 10 * np.log10(1 / 12 / (error / volume))
    assert 0.9 < gain < 1.1, "decibels, of 1.53 at most"


_FREED = """
import numpy as np
from spectral_surgery.kernels.lattice import nearest_reference
from spectral_surgery.kernels.nearest import nearest

random = np.random.default_rng(0)
values, inverse = random.normal(0, 2, (32, 70)).astype(np.float32), np.ones(70, np.float32)
costs = np.linspace(0, 30, 200, dtype=np.float32)  # too large for what glibc keeps as it is
out = np.empty(values.shape, np.int32)
nearest(values, inverse, costs, out)
assert np.array_equal(out, nearest_reference(values, inverse, costs))
"""


@pytest.mark.parametrize("byte", ["1", "85"])
def test_nothing_is_read_of_memory_that_was_freed(byte: str) -> None:
    """glibc overwrites what is freed when it is asked to."""
    environment = os.environ | {"MALLOC_PERTURB_": byte, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", _FREED], check=True, env=environment, timeout=120)
