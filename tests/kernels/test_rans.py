"""The entropy coder: symbols come back from every number of lanes, in as many bits as their entropy says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.symbol_table import ABOUT_HALF, ABOUT_ZERO, fitted_table, with_parity
from spectral_surgery.kernels.lattice import MASKS, words_of
from spectral_surgery.kernels.rans import (
    BLOCK,
    FLOOR,
    LARGEST,
    SLOTS,
    decode,
    decoding_table,
    encode,
    symbols_of,
)
from tests.support.codes import integers, lattice_points

Ints = npt.NDArray[Any]
NO_MASKS = np.zeros(0, np.uint32)
LANES = (1, 2, 3, 8, 64)
SHAPES = [(1, 1), (1, 9), (2, 1), (31, 5), (32, 1), (32, 8), (33, 7), (64, 17), (97, 40)]


def counted(symbols: Ints, c: Ints | None = None) -> Ints:
    """[1 or 2, 256]: how often each symbol occurs."""
    if c is None:
        return np.bincount(symbols.reshape(-1) + 128, minlength=256)[None]
    return np.stack([np.bincount(symbols[c == one] + 128, minlength=256) for one in (0, 1)])


def round_trip(symbols: Ints, frequencies: Ints, lanes: int, masks: Ints = NO_MASKS, parity: bool = False) -> int:
    """Encode and decode symbols; returns the words of the stream."""
    stream, states = encode(symbols, masks, frequencies, parity, lanes)
    assert ((states >= FLOOR) & (states < 1 << 63)).all()
    out = np.full(symbols.shape, 99, np.int32)
    read = decode(padded(stream), states, decoding_table(frequencies), masks, out, parity, 0)
    assert read == len(stream)
    np.testing.assert_array_equal(out, symbols)
    return len(stream)


def padded(stream: Ints) -> Ints:
    return np.concatenate((stream, np.zeros(1, np.uint32)))


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
    symbols, masks, frequencies = lattice_symbols(codes)
    round_trip(symbols, frequencies, lanes, masks, parity=True)
    stream, states = encode(symbols, masks, frequencies, True, lanes)
    for dtype in (np.int8, np.int32):
        out = np.zeros(shape, dtype)
        assert decode(padded(stream), states, decoding_table(frequencies), masks, out, True, 1) == len(stream)
        np.testing.assert_array_equal(out, codes.astype(dtype))


def lattice_symbols(codes: Ints) -> tuple[Ints, Ints, Ints]:
    """Symbols m, the bits c of every block, and frequencies with those of known parity."""
    words = np.empty(-(-codes.shape[0] // BLOCK) * codes.shape[1], np.uint8)
    assert words_of(codes, words)
    main = [
        fitted_table(counts, symmetry).by_symbol()
        for counts, symmetry in zip(counted(codes >> 1, codes & 1), (ABOUT_ZERO, ABOUT_HALF), strict=True)
    ]
    known = [with_parity(one) for one in main]
    return codes >> 1, MASKS[words], np.stack([*main, *(known[c][p] for p in (0, 1) for c in (0, 1))])


@pytest.mark.parametrize("lanes", LANES)
def test_one_symbol_alone(lanes: int) -> None:
    frequencies = np.zeros((1, 256), np.int64)
    frequencies[0, 128 + 5] = SLOTS - 1
    words = round_trip(np.full((320, 64), 5, np.int32), frequencies, lanes)
    assert words == 0, "20480 symbols of 1/2839 bit are 7 bits"


@pytest.mark.parametrize("least", [-127, -128])
@pytest.mark.parametrize("lanes", LANES)
def test_every_symbol(lanes: int, least: int) -> None:
    symbols = np.resize(np.random.default_rng(0).permutation(np.arange(least, 128)), (64, 51)).astype(np.int32)
    frequencies = np.where(np.arange(256) - 128 >= least, SLOTS // (128 - least), 0)[None]
    assert (frequencies > 0).sum() == 128 - least
    round_trip(symbols, frequencies, lanes)


@pytest.mark.parametrize("lanes", LANES)
def test_the_least_frequency(lanes: int) -> None:
    """States go through their whole range: 12 bits for each of some symbols, next to nothing for the others."""
    frequencies = np.zeros((1, 256), np.int64)
    frequencies[0, 128:130] = SLOTS - 1, 1
    for share in (0.0, 0.01, 0.5, 1.0):
        symbols = (np.random.default_rng(0).random((96, 40)) < share).astype(np.int32)
        words = round_trip(symbols, frequencies, lanes)
        assert abs(32 * words - 12 * symbols.sum()) < 32 * (lanes + 1) + 1


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
        symbols, masks, frequencies = lattice_symbols(lattice_points(rng, shape, spread, np.int8).astype(np.int32))
        round_trip(symbols, frequencies, lanes, masks, parity=True)
    else:
        symbols = integers(rng, shape, spread).clip(-127, 127)
        round_trip(symbols, fitted_table(counted(symbols)[0], ABOUT_ZERO).by_symbol()[None], lanes)


def test_bits_are_those_of_the_frequencies() -> None:
    symbols = integers(np.random.default_rng(0), (1024, 256), 3).clip(-127, 127)
    counts = counted(symbols)[0]
    frequencies = fitted_table(counts, ABOUT_ZERO).by_symbol()
    bits = -(counts * np.log2(np.maximum(frequencies, 1) / SLOTS)).sum()
    words = round_trip(symbols, frequencies[None], 8)
    assert 0 <= 32 * words + 8 * 64 - bits <= 8 * 64


def test_a_symbol_without_a_frequency_is_refused() -> None:
    frequencies = np.zeros((1, 256), np.int64)
    frequencies[0, 128] = SLOTS - 1
    symbols = np.zeros((40, 3), np.int32)
    for place in ((0, 0), (39, 2), (31, 1), (32, 0)):
        other = symbols.copy()
        other[place] = 1
        with pytest.raises(ValueError, match="expected a frequency for every symbol"):
            encode(other, NO_MASKS, frequencies, False, 2)


def test_another_stream_is_noticed() -> None:
    symbols = integers(np.random.default_rng(0), (64, 40), 4).clip(-127, 127)
    frequencies = fitted_table(counted(symbols)[0], ABOUT_ZERO).by_symbol()[None]
    stream, states = encode(symbols, NO_MASKS, frequencies, False, 2)
    table, out = decoding_table(frequencies), np.zeros(symbols.shape, np.int8)
    for word in range(len(stream)):
        other = padded(stream)
        other[word] ^= 1 << word % 32
        assert decode(other, states, table, NO_MASKS, out, False, 0) != len(stream)
    empty = np.zeros(SLOTS, np.uint32)
    assert decode(padded(stream), states, empty, NO_MASKS, out, False, 0) == -1, "a table without symbols"


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
    symbols, counts = np.empty_like(codes), np.ones((2, 256), np.int64)
    beyond = symbols_of(codes, lattice, low, symbols, counts)
    wanted = codes.astype(np.int64) >> (low + lattice)
    far = np.abs(wanted) > LARGEST
    assert beyond == far.sum()
    np.testing.assert_array_equal(symbols[~far], wanted[~far])
    assert (np.abs(symbols[far]) <= 127).all()
    assert (np.abs(symbols[far]) > LARGEST).all()
    np.testing.assert_array_equal(symbols & 1, wanted & 1)
    np.testing.assert_array_equal(np.sign(symbols[far]), np.sign(wanted[far]))
    c = codes & 1 if lattice else np.zeros_like(codes)
    np.testing.assert_array_equal(counts - 1, counted(symbols, c))
