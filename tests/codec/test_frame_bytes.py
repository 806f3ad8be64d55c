"""Frames: every code comes back, sizes are near the entropy, and damaged bytes are errors."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from spectral_surgery.codec.frame_bytes import Layout, choose_layout, decode_frame, encode_frame, entropy
from spectral_surgery.errors import CheckpointError, ConfigError, LimitError

LAYOUTS = [
    *(Layout("packed", digits) for digits in (1, 2, 3, 5)),
    *(Layout("split", 2, bits) for bits in (1, 2, 3, 4, 6, 7)),
    *(Layout(kind, digits) for kind in ("bitmap", "gaps") for digits in (1, 2, 3, 4)),
]


def codes_of(rng: np.random.Generator, n: int, scale: float, dtype: Any) -> Any:
    limit = np.iinfo(dtype).max
    return np.clip(rng.standard_t(1.5, n) * scale, -limit, limit).astype(dtype)


def gaussian_codes(n: int, dead_zone: float, step: float) -> Any:
    x = np.random.default_rng(0).standard_normal(n)
    magnitude = np.maximum(np.floor((np.abs(x) - dead_zone) / step) + 1, 0)
    codes = np.sign(x) * magnitude
    return codes.astype(np.int8 if magnitude.max() <= 127 else np.int16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_every_layout_holds_every_code(layout: Layout, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    limit = np.iinfo(dtype).max
    cases = [codes_of(rng, n, scale, dtype) for n in (0, 1, 7, 8, 9, 15, 16, 17, 63, 1000) for scale in (0.3, 3, 40)]
    cases += [np.array([limit, -limit, -limit - 1, 0, 1, -1] * 7, dtype), np.zeros(100, dtype)]
    cases += [np.full(33, -limit - 1, dtype)]
    for codes in cases:
        back = decode_frame(encode_frame(codes, layout), codes.size)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, codes)
        out = np.full(codes.size, 99, np.int8)
        given = decode_frame(encode_frame(codes, layout), codes.size, out)
        np.testing.assert_array_equal(given, codes)
        assert np.shares_memory(given, out) == (dtype == np.int8 and codes.size > 0)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=70), st.sampled_from(LAYOUTS))
def test_round_trip_of_anything(values: list[int], layout: Layout) -> None:
    codes = np.array(values, np.int32)
    np.testing.assert_array_equal(decode_frame(encode_frame(codes, layout), codes.size), codes)


@pytest.mark.parametrize(
    ("dead_zone", "step", "bits"),
    [
        *((0.008, 0.016, 8), (0.03, 0.06, 6), (0.15, 0.25, 4), (0.3, 0.5, 3), (0.6, 1, 2)),
        *((0.9, 1.5, 1.4), (1.2, 2, 1), (1.45, 2.4, 0.75), (1.28, 0.5, 1.2)),
    ],
)
def test_stored_bits_are_near_the_entropy(dead_zone: float, step: float, bits: float) -> None:
    codes = gaussian_codes(1 << 18, dead_zone, step)
    least = entropy(codes)
    assert least == pytest.approx(bits, abs=0.15)
    assert 8 * len(encode_frame(codes, choose_layout(codes))) / codes.size <= 1.03 * least


@pytest.mark.parametrize("density", [0.01, 0.03, 0.1])
def test_gaps_are_near_the_entropy_where_bits_cannot_be(density: float) -> None:
    """A byte costs zstd a bit at least, and most bytes of a sparse bitmap are zero."""
    codes = (np.random.default_rng(0).random(1 << 18) < density).astype(np.int8)
    least = entropy(codes) * codes.size / 8
    assert len(encode_frame(codes, Layout("gaps", 4))) < 1.05 * least
    if density < 0.1:
        assert len(encode_frame(codes, Layout("bitmap", 4))) > 1.2 * least


def test_one_layout_alone_is_not_enough() -> None:
    codes = gaussian_codes(1 << 18, 1.28, 0.5)
    packed = min(len(encode_frame(codes, layout)) for layout in LAYOUTS if layout == Layout("packed", 2))
    assert 8 * packed / codes.size > 1.1 * entropy(codes)
    assert choose_layout(codes).is_sparse


@pytest.mark.parametrize("outlier", [1000, 2**30])
def test_outliers_do_not_choose_the_layout(outlier: int) -> None:
    codes = gaussian_codes(1 << 18, 1.28, 0.5).astype(np.int32)
    plain = len(encode_frame(codes, choose_layout(codes)))
    codes[:: 1 << 12] = outlier
    assert len(encode_frame(codes, choose_layout(codes))) < 1.01 * plain
    few = np.where(np.arange(1 << 18) % 4096 == 0, codes, 0).astype(np.int32)
    assert len(encode_frame(few, choose_layout(few))) < 2000


def test_equal_codes_give_equal_bytes() -> None:
    codes = gaussian_codes(5000, 0.3, 0.5)
    assert encode_frame(codes, choose_layout(codes)) == encode_frame(codes.copy(), choose_layout(codes.copy()))


def test_only_flat_signed_integers_are_codes() -> None:
    with pytest.raises(ConfigError, match=r"codes are float32 \(3,\)"):
        encode_frame(np.zeros(3, np.float32), LAYOUTS[0])
    with pytest.raises(ConfigError, match=r"codes are int8 \(3, 3\)"):
        encode_frame(np.zeros((3, 3), np.int8), LAYOUTS[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_truncated_and_flipped_frames(layout: Layout) -> None:
    codes = codes_of(np.random.default_rng(1), 200, 4, np.int16)
    frame = encode_frame(codes, layout)
    for length in range(len(frame)):
        with pytest.raises(CheckpointError):
            decode_frame(frame[:length], codes.size)
    with pytest.raises(CheckpointError, match="sections do not add up"):
        decode_frame(frame + b"\0", codes.size)
    rng = np.random.default_rng(2)
    for _ in range(200):
        damaged = bytearray(frame)
        damaged[rng.integers(len(frame))] ^= 1 << rng.integers(8)
        try:
            assert decode_frame(bytes(damaged), codes.size).shape == codes.shape
        except CheckpointError:
            continue


def test_low_bits_belong_to_one_layout() -> None:
    for layout, low_bits in ((Layout("packed", 2), 2), (Layout("split", 2, 2), 0)):
        frame = bytearray(encode_frame(np.ones(100, np.int8), layout))
        frame[2] = low_bits
        with pytest.raises(CheckpointError, match="impossible layout"):
            decode_frame(bytes(frame), 100)


def test_a_frame_for_another_count_is_refused() -> None:
    frame = encode_frame(np.ones(100, np.int8), Layout("packed", 2))
    with pytest.raises(LimitError, match="declares 50 bytes where 51 belong"):
        decode_frame(frame, 101)


def test_a_small_frame_claiming_terabytes() -> None:
    bomb = b"\x28\xb5\x2f\xfd" + bytes([0xC0, 0x00]) + struct.pack("<Q", 1 << 42) + b"\x01\0\0"
    assert zstandard.frame_content_size(bomb) == 1 << 42
    frame = struct.pack("<BBBBB", 0, 1, 0, 1, 0) + struct.pack("<I", len(bomb)) + bomb
    tracemalloc.start()
    with pytest.raises(LimitError, match=r"declares 4398046511104 bytes where 100 belong; .*do not use it"):
        decode_frame(frame, 100)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ((9, 1, 0, 1, 0), "unknown layout"),
        ((0, 7, 0, 1, 0), "unknown layout"),
        ((0, 1, 0, 3, 0), "unknown layout"),
        ((0, 1, 8, 1, 0), "impossible layout"),
        ((1, 1, 1, 1, 0), "impossible layout"),
        ((2, 1, 1, 1, 0), "impossible layout"),
        ((0, 1, 0, 1, 2), "impossible layout"),
    ],
)
def test_headers_that_lie(header: tuple[int, ...], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        decode_frame(struct.pack("<BBBBB", *header) + bytes(40), 10)


def test_a_digit_out_of_range() -> None:
    section = zstandard.ZstdCompressor().compress(bytes([226] * 5))  # 15 * 15 = 225 values only
    frame = struct.pack("<BBBBBI", 0, 2, 0, 1, 0, len(section)) + section
    with pytest.raises(CheckpointError, match="a digit is out of range"):
        decode_frame(frame, 10)


@pytest.mark.parametrize("gaps", [bytes([9]), bytes([0, 8]), bytes([255])])
def test_a_place_beyond_the_frame(gaps: bytes) -> None:
    sections = [zstandard.ZstdCompressor().compress(data) for data in (gaps, bytes(2))]
    frame = struct.pack("<BBBBBII", 2, 1, 0, 1, 0, *map(len, sections)) + b"".join(sections)
    with pytest.raises(CheckpointError, match=r"a code at place \d+ of 9; the data is damaged"):
        decode_frame(frame, 9)


def test_more_gaps_than_places() -> None:
    sections = [zstandard.ZstdCompressor().compress(data) for data in (bytes(11), bytes(2))]
    frame = struct.pack("<BBBBBII", 2, 1, 0, 1, 0, *map(len, sections)) + b"".join(sections)
    with pytest.raises(LimitError, match="declares 11 bytes where at most 10 belong"):
        decode_frame(frame, 10)


def test_an_overflow_beyond_the_code_type() -> None:
    sections = [zstandard.ZstdCompressor().compress(data) for data in (bytes([14]), bytes([0]), bytes([255]))]
    frame = struct.pack("<BBBBBIII", 0, 2, 0, 1, 1, *map(len, sections)) + b"".join(sections)
    with pytest.raises(CheckpointError, match="a code exceeds int8"):
        decode_frame(frame, 1)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "zstd says .*; the data is damaged"),
        (b"not zstd at all", "zstd says"),
        (zstandard.ZstdCompressor().compress(bytes(10)) + b"more", "zstd says .*unused data"),
        (zstandard.ZstdCompressor().compress(bytes(range(10)))[:-1], "zstd says"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10)), "declares -1 bytes where 10 belong"),
    ],
)
def test_sections_zstd_refuses(data: bytes, text: str) -> None:
    frame = struct.pack("<BBBBBI", 0, 1, 0, 1, 0, len(data)) + data
    with pytest.raises(CheckpointError, match=text):
        decode_frame(frame, 10)


def test_headers_cut_short() -> None:
    with pytest.raises(CheckpointError, match="4 bytes are too few for a header"):
        decode_frame(bytes(4), 10)
    with pytest.raises(CheckpointError, match="8 bytes are too few for a header"):
        decode_frame(struct.pack("<BBBBB", 0, 1, 0, 1, 0) + bytes(3), 10)
