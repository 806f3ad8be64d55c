"""Digits that share bytes, and codes split into a high part and low bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spectral_surgery.codec.digits import join_low, low_size, pack, split_low, unpack
from spectral_surgery.errors import CheckpointError

SIZES = (0, 1, 2, 7, 8, 9, 100)
SPLITS = [*((np.int8, bits) for bits in range(1, 8)), (np.int16, 8), (np.int16, 15), (np.int32, 17), (np.int32, 31)]
BASES = [(255, 1), (256, 1), (15, 2), (16, 2), (5, 3), (6, 3), (4, 4), (3, 5), (2, 8)]


@pytest.mark.parametrize(("base", "each"), BASES)
@pytest.mark.parametrize("size", SIZES)
def test_digits_come_back(base: int, each: int, size: int) -> None:
    digits = np.random.default_rng(0).integers(0, base, size).astype(np.uint8)
    packed = pack(digits, base, each)
    assert packed.size == -(-size // each)
    out = np.full(size, 77, np.uint8)
    unpack(packed, base, each, out)
    np.testing.assert_array_equal(out, digits)
    unpack(packed, base, each, out, less=base // 2)
    np.testing.assert_array_equal(out, digits - np.uint8(base // 2))


def test_a_byte_that_no_digits_give_is_noticed() -> None:
    with pytest.raises(CheckpointError, match="a digit is out of range"):
        unpack(np.array([225], np.uint8), 15, 2, np.empty(2, np.uint8))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [*((np.int8, b) for b in range(1, 8)), (np.int16, 8), (np.int16, 15), (np.int32, 17), (np.int32, 31)],
)
@pytest.mark.parametrize("size", SIZES)
def test_low_bits_come_back(dtype: Any, bits: int, size: int) -> None:
    info = np.iinfo(dtype)
    codes = np.random.default_rng(0).integers(info.min, info.max, size, dtype, endpoint=True)
    if size > 1:
        codes[:2] = info.min, info.max
    high, low = split_low(codes, bits)
    assert len(low) == low_size(size, bits) <= -(-size * bits // 8) + bits // 8 + 3
    join_low(high, memoryview(low), bits)
    np.testing.assert_array_equal(high, codes)


def test_the_high_part_is_the_nearest_multiple() -> None:
    codes = np.arange(-40, 40, dtype=np.int8)
    high, _ = split_low(codes, 4)
    np.testing.assert_array_equal(high, np.floor(codes / 16 + 0.5))
