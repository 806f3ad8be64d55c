"""The entropy coder: symbols come back from every number of lanes, in as many bits as their entropy says."""

from __future__ import annotations

from typing import Any

import numba.core.registry
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.symbol_table import ABOUT_HALF, ABOUT_ZERO, fitted_table, with_parity
from spectral_surgery.kernels import lanes as many
from spectral_surgery.kernels.lattice import words_of
from spectral_surgery.kernels.rans import (
    BLOCK,
    FLOOR,
    LARGEST,
    SLOTS,
    count_symbols,
    decode,
    decoding_table,
    encode,
    reciprocals,
)
from tests.support.codes import integers, lattice_points

Ints = npt.NDArray[Any]
NO_WORDS = np.zeros(0, np.uint8)
VECTORS = "+avx2" in numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[2]
LANES = (1, 2, 3, 16, 64)
SHAPES = [(1, 1), (1, 9), (2, 1), (31, 5), (32, 1), (32, 8), (33, 7), (64, 17), (97, 40)]


def counted(symbols: Ints, c: Ints | None = None) -> Ints:
    """[1 or 2, 256]: how often each symbol occurs."""
    if c is None:
        return np.bincount(symbols.reshape(-1) + 128, minlength=256)[None]
    return np.stack([np.bincount(symbols[c == one] + 128, minlength=256) for one in (0, 1)])


def round_trip(codes: Ints, frequencies: Ints, lanes: int, words: Ints = NO_WORDS, parity: bool = False) -> int:
    """Encode and decode codes, plainly and, with some numbers of lanes, fast; returns the words of the stream."""
    stream, states = encode(codes, words, 0, frequencies, parity, lanes)
    assert ((states >= FLOOR) & (states < 1 << 32)).all()
    table, out = decoding_table(frequencies), np.full(codes.shape, 99, np.int16)
    assert decode(padded(stream), states, table, words, out, parity, 0) == len(stream)
    np.testing.assert_array_equal(out, codes)
    if lanes in many.LANES and parity == (words.size > 0):
        assert_fast(codes, stream, states, table, words)
    return len(stream)


def assert_fast(codes: Ints, stream: Ints, states: Ints, table: Ints, words: Ints) -> None:
    """Blocks in vectors, and the rest plainly, give the same codes."""
    out, left, lanes = np.full(codes.shape, 99, np.int8), states.astype(np.uint32), len(states)
    done, read = many.decode(packed(words), stream.astype("<u2").view(np.uint8), left, table, out)
    if VECTORS:
        assert done == codes.shape[0] // BLOCK * codes.shape[1] // lanes * lanes
    else:
        assert (done, read) == (0, 0)
    rest, states = padded(stream[read:]), left.astype(np.uint64)
    assert decode(rest, states, table, words[done:], out, words.size > 0, done) == len(stream) - read
    np.testing.assert_array_equal(out, codes)


def packed(words: Ints) -> Ints:
    """Six bits of each, one after the other."""
    bits = words[:, None] >> np.arange(6, dtype=np.uint8) & 1
    return np.packbits(bits, bitorder="little")


def padded(stream: Ints) -> Ints:
    return np.concatenate((stream, np.zeros(1, stream.dtype)))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_context(shape: tuple[int, int], lanes: int) -> None:
    symbols = integers(np.random.default_rng(0), shape, 4).clip(-127, 127)
    frequencies = np.stack([fitted_table(counts, ABOUT_ZERO).by_symbol() for counts in counted(symbols)])
    round_trip(symbols, frequencies, lanes)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contexts_of_the_lattice(shape: tuple[int, int], lanes: int) -> None:
    codes = lattice_points(np.random.default_rng(0), shape, 4, np.int8).astype(np.int32)
    words, frequencies = lattice_words(codes)
    round_trip(codes, frequencies, lanes, words, parity=True)
    round_trip(codes, frequencies[:2], lanes, words)
    stream, states = encode(codes, words, 0, frequencies, True, lanes)
    for dtype in (np.int8, np.int32):
        out = np.zeros(shape, dtype)
        assert decode(padded(stream), states, decoding_table(frequencies), words, out, True, 0) == len(stream)
        np.testing.assert_array_equal(out, codes)


def lattice_words(codes: Ints) -> tuple[Ints, Ints]:
    """The word of every block, and frequencies of symbols m with those of known parity."""
    words = np.empty(-(-codes.shape[0] // BLOCK) * codes.shape[1], np.uint8)
    assert words_of(codes, words)
    main = [
        fitted_table(counts, symmetry).by_symbol()
        for counts, symmetry in zip(counted(codes >> 1, codes & 1), (ABOUT_ZERO, ABOUT_HALF), strict=True)
    ]
    known = [with_parity(one) for one in main]
    return words, np.stack([*main, *(known[c][p] for p in (0, 1) for c in (0, 1))])


@pytest.mark.parametrize("lanes", LANES)
def test_one_symbol_alone(lanes: int) -> None:
    frequencies = np.zeros((1, 256), np.int64)
    frequencies[0, 128 + 5] = SLOTS - 1
    words = round_trip(np.full((320, 64), 5, np.int32), frequencies, lanes)
    assert words == 0, "20480 symbols of 1/2839 bit are 7 bits"


@pytest.mark.parametrize("lanes", LANES)
def test_every_symbol(lanes: int) -> None:
    symbols = np.resize(np.random.default_rng(0).permutation(np.arange(-127, 128)), (64, 51)).astype(np.int32)
    frequencies = np.where(np.arange(256) > 0, SLOTS // 255, 0)[None]
    round_trip(symbols, frequencies, lanes)


@pytest.mark.parametrize("lanes", LANES)
def test_the_least_frequency(lanes: int) -> None:
    """States go through their whole range: 12 bits for each of some symbols, next to nothing for the others."""
    frequencies = np.zeros((1, 256), np.int64)
    frequencies[0, 128:130] = SLOTS - 1, 1
    for share in (0.0, 0.01, 0.5, 1.0):
        symbols = (np.random.default_rng(0).random((96, 40)) < share).astype(np.int32)
        words = round_trip(symbols, frequencies, lanes)
        assert abs(16 * words - 12 * symbols.sum()) < 16 * (lanes + 1) + 1


@given(
    seed=st.integers(0, 1 << 30),
    shape=st.tuples(st.integers(1, 80), st.integers(1, 12)),
    spread=st.floats(-4, 5).map(np.exp2),
    lanes=st.integers(1, 64),
    points=st.booleans(),
)
def test_anything(seed: int, shape: tuple[int, int], spread: float, lanes: int, points: bool) -> None:
    rng = np.random.default_rng(seed)
    if points:
        codes = lattice_points(rng, shape, spread, np.int8).astype(np.int32)
        words, frequencies = lattice_words(codes)
        round_trip(codes, frequencies, lanes, words, parity=True)
    else:
        symbols = integers(rng, shape, spread).clip(-127, 127)
        round_trip(symbols, fitted_table(counted(symbols)[0], ABOUT_ZERO).by_symbol()[None], lanes)


def test_bits_are_those_of_the_frequencies() -> None:
    symbols = integers(np.random.default_rng(0), (1024, 256), 3).clip(-127, 127)
    counts = counted(symbols)[0]
    frequencies = fitted_table(counts, ABOUT_ZERO).by_symbol()
    bits = -(counts * np.log2(np.maximum(frequencies, 1) / SLOTS)).sum()
    words = round_trip(symbols, frequencies[None], 16)
    assert 0 <= 16 * words + 16 * 32 - bits <= 16 * 32


def test_a_symbol_without_a_frequency_is_refused() -> None:
    frequencies = np.zeros((1, 256), np.int64)
    frequencies[0, 128] = SLOTS - 1
    symbols = np.zeros((40, 3), np.int32)
    for place in ((0, 0), (39, 2), (31, 1), (32, 0)):
        other = symbols.copy()
        other[place] = 1
        with pytest.raises(ValueError, match="expected a frequency for every symbol"):
            encode(other, NO_WORDS, 0, frequencies, False, 2)


def test_another_stream_is_noticed() -> None:
    symbols = integers(np.random.default_rng(0), (64, 40), 4).clip(-127, 127)
    frequencies = fitted_table(counted(symbols)[0], ABOUT_ZERO).by_symbol()[None]
    stream, states = encode(symbols, NO_WORDS, 0, frequencies, False, 2)
    table, out = decoding_table(frequencies), np.zeros(symbols.shape, np.int8)
    for word in range(len(stream)):
        other = padded(stream)
        other[word] ^= 1 << word % 16
        assert decode(other, states, table, NO_WORDS, out, False, 0) != len(stream)
    empty = np.zeros(SLOTS, np.uint32)
    assert decode(padded(stream), states, empty, NO_WORDS, out, False, 0) == -1, "a table without symbols"


def test_slots_of_a_table() -> None:
    frequencies = np.zeros((2, 256), np.int64)
    frequencies[0, [127, 128, 130]] = 5, 4000, 90
    frequencies[1, 0] = 4095
    table = decoding_table(frequencies).reshape(2, SLOTS)
    symbol = (table & 255).astype(np.uint8).astype(np.int8)
    frequency, place = table >> 20, table >> 8 & 4095
    np.testing.assert_array_equal(symbol[0, :4095], np.repeat([-1, 0, 2], [5, 4000, 90]))
    np.testing.assert_array_equal(frequency[0, :4095], np.repeat([5, 4000, 90], [5, 4000, 90]))
    np.testing.assert_array_equal(place[0, :4095], np.concatenate([np.arange(n) for n in (5, 4000, 90)]))
    assert symbol[1, 0] == -128
    assert (table[:, 4095] == 0).all()


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("low", [0, 1, 5, 24])
def test_symbols_of_codes(lattice: bool, low: int) -> None:
    extremes = np.array([-(1 << 31), (1 << 31) - 1, 127, 128, -127, -128, 254, 255, 256, -254, -255, -256], np.int32)
    codes = np.concatenate((extremes, integers(np.random.default_rng(0), (1, 500), 3e3)[0])).reshape(8, 64)
    counts = np.ones((2, 256), np.int64)
    beyond = count_symbols(codes, lattice, low, counts)
    symbols = codes.astype(np.int64) >> (low + lattice)
    far = np.abs(symbols) > LARGEST
    assert beyond == far.sum()
    near = np.where(far, np.sign(symbols) * (LARGEST + 1 + (symbols & 1)), symbols)
    c = codes & 1 if lattice else np.zeros_like(codes)
    np.testing.assert_array_equal(counts - 1, counted(near, c))


@pytest.mark.parametrize("lanes", many.LANES)
@pytest.mark.parametrize("spread", [0.02, 0.3, 2, 6])
@pytest.mark.parametrize("shape", [(32, 16), (32, 64), (64, 72), (96, 100), (160, 1021), (320, 7), (257, 256)], ids=str)
@pytest.mark.parametrize("points", [False, True])
def test_lanes_in_vectors(shape: tuple[int, int], spread: float, points: bool, lanes: int) -> None:
    """Lines at hand that are full or not, groups that go on in the next blocks of rows, and rows that are left."""
    rng = np.random.default_rng(0)
    if points:
        codes = lattice_points(rng, shape, spread, np.int8).astype(np.int32)
        words, frequencies = lattice_words(codes)
        round_trip(codes, frequencies, lanes, words, parity=True)
    else:
        codes = integers(rng, shape, spread).clip(-127, 127)
        round_trip(codes, fitted_table(counted(codes)[0], ABOUT_ZERO).by_symbol()[None], lanes)


def test_divisions_by_frequencies_are_exact() -> None:
    """For states below 2^63, with the reciprocals of the encoder."""
    rng = np.random.default_rng(0)
    numbers = [*(int(n) for n in rng.integers(0, 1 << 63, 50)), *((1 << k) - 1 for k in range(64)), 1 << 62]
    for f in (2, 3, 5, 7, 100, 1023, 1024, 1025, 2048, 4094, 4095):
        r, s = (int(v) for v in reciprocals()[f])
        for number in numbers:
            for x in (number, number // f * f, max(number // f * f - 1, 0)):
                assert (x * r >> 64) >> s == x // f
