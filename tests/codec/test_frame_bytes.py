"""Frames: every code comes back, sizes are at the entropy, and damaged bytes are errors or other codes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cases.coding import information_of
from spectral_surgery.codec.frame_bytes import INTEGERS, LATTICE, TURNED, ZEROS, decode_frame, encode_frame
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.kernels.nearest import nearest
from tests.codec.golden_frames import FOLDER, Golden, read
from tests.support.codes import Codes, integers, lattice_points

DTYPES = (np.int8, np.int16, np.int32)
SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 40), (40, 1), (31, 3), (32, 3), (33, 3), (64, 129), (95, 200)]
LARGE = [file for file in sorted(FOLDER.glob("*.json")) if file.stem.endswith(("int8-16-lanes", "int8-64-lanes"))]
SMALL = [file for file in sorted(FOLDER.glob("*.json")) if file.stat().st_size < 3500 and "lanes" not in file.stem]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", [integers, lattice_points])
def test_every_code_comes_back(make: Any, shape: tuple[int, int], dtype: Any) -> None:
    rng = np.random.default_rng(0)
    for spread in (0.1, 3, 90, 4e4, 1e9):
        codes = make(rng, shape, spread, dtype)
        back = decode_frame(encode_frame(codes), shape)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_codes_come_back(dtype: Any) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for values in ([low], [high], [low, high], [low, high, 0, 1, -1], [0] * 40 + [low]):
        codes = np.resize(np.array(values, dtype), (40, 7))
        np.testing.assert_array_equal(decode_frame(encode_frame(codes), codes.shape), codes)


def test_codes_need_not_be_contiguous() -> None:
    codes = integers(np.random.default_rng(0), (60, 40), 3, np.int16)
    assert encode_frame(codes.T) == encode_frame(np.ascontiguousarray(codes.T))


def test_int8_codes_go_where_they_are_wanted() -> None:
    rng = np.random.default_rng(0)
    for codes in (
        integers(rng, (40, 9), 50, np.int8),
        lattice_points(rng, (40, 9), 3, np.int8),
        np.zeros((40, 9), "i1"),
    ):
        out = np.full(codes.shape, 99, np.int8)
        assert decode_frame(encode_frame(codes), codes.shape, out) is out
        np.testing.assert_array_equal(out, codes)
    wide, out = np.full((40, 9), 1000, np.int16), np.full((40, 9), 99, np.int8)
    np.testing.assert_array_equal(decode_frame(encode_frame(wide), wide.shape, out), wide)
    assert (out == 99).all()


def test_equal_codes_give_equal_bytes() -> None:
    codes = integers(np.random.default_rng(0), (50, 60), 3, np.int8)
    assert encode_frame(codes) == encode_frame(codes.copy())


@pytest.mark.parametrize("codes", [np.zeros((3, 3), np.float32), np.zeros(3, np.int8), np.zeros((3, 3), np.uint8)])
def test_only_matrices_of_signed_integers_are_codes(codes: Codes) -> None:
    with pytest.raises(ConfigError, match="expected int8, int16 or int32"):
        encode_frame(codes)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.5, 4, 12, 30, 60, 1000])
@pytest.mark.parametrize("kind", [INTEGERS, LATTICE])
def test_sizes_are_at_the_entropy(kind: int, scale: float) -> None:
    codes = gaussian_codes(kind, scale)
    frame = encode_frame(codes)
    assert frame[0] == kind
    assert 8 * len(frame) <= 1.005 * information_of(codes)


def gaussian_codes(kind: int, scale: float) -> Codes:
    """[1024, 1024] Gaussian numbers, rounded: integers, or the nearest points of the lattice."""
    values = (scale * np.random.default_rng(0).standard_normal((1024, 1024))).astype(np.float32)
    codes = np.rint(values).astype(np.int32)
    if kind == LATTICE:
        ones, free = np.ones(1024, np.float32), np.zeros(1, np.float32)
        for top in range(0, 1024, 32):
            nearest(values[top : top + 32], ones, free, codes[top : top + 32])
    return codes


@pytest.mark.parametrize("density", [0.003, 0.01, 0.1])
def test_sparse_codes_are_near_the_entropy(density: float) -> None:
    """The header, a table, and states of 64 bytes count here."""
    rng = np.random.default_rng(0)
    codes = ((rng.random((1024, 1024)) < density) * rng.choice([-1, 1], (1024, 1024))).astype(np.int8)
    assert 8 * len(encode_frame(codes)) <= 1.005 * information_of(codes) + 8 * 90


def test_a_few_large_codes_cost_only_themselves() -> None:
    rng = np.random.default_rng(0)
    for make in (integers, lattice_points):
        codes = make(rng, (256, 512), 1)
        before = len(encode_frame(codes))
        codes[::64, ::64] = codes[::64, ::64] % 4 + (1 << 29)
        codes = codes if make is integers else with_even_blocks(codes)
        assert len(encode_frame(codes)) <= before + 6 * 32 + 2 * 128, "each a symbol and 4 bytes, and longer tables"


@pytest.mark.parametrize("extremes", [(-128, 126), (-127, 127), (-128, 127)])
def test_the_least_and_the_largest_codes_in_many_lanes(extremes: tuple[int, int]) -> None:
    """A table that is symmetric has a frequency for 128 where -128 occurs."""
    codes = lattice_points(np.random.default_rng(0), (256, 512), 5, np.int8)
    codes[:64, :2] = extremes
    frame = encode_frame(codes)
    assert frame[:4] == bytes([LATTICE, 1, 0, 64 + 128])
    np.testing.assert_array_equal(decode_frame(frame, codes.shape), codes)


def with_even_blocks(codes: Codes) -> Codes:
    """The second row of each block is changed where the m of the block add up to an odd number."""
    blocks = codes.reshape(-1, 32, codes.shape[1])
    blocks[:, 1] += 2 * ((blocks >> 1).sum(1) & 1).astype(codes.dtype)
    return blocks.reshape(codes.shape)


# ------------------------------------------------------------------------------------------------------ damaged frames


def damages(frame: bytes) -> Iterator[bytes]:
    """Every byte changed in two ways, every end cut, and bytes too many."""
    for place in range(len(frame)):
        for change in (1 << place % 8, 255):
            yield frame[:place] + bytes([frame[place] ^ change]) + frame[place + 1 :]
        yield frame[:place]
    yield frame + b"\0"
    yield frame + frame


@pytest.mark.parametrize("file", SMALL, ids=lambda file: file.stem)
def test_damaged_frames_are_errors_or_other_codes(file: Path) -> None:
    golden = read(file)
    errors = sum(is_refused(frame, golden.codes.shape) for frame in damages(golden.frame))
    assert errors > len(golden.frame), "whatever is cut off is missed"


def is_refused(frame: bytes, shape: tuple[int, int]) -> bool:
    try:
        codes = decode_frame(frame, shape)
    except CheckpointError:
        return True
    assert codes.shape == shape
    assert codes.dtype in DTYPES
    return False


@pytest.mark.parametrize("file", SMALL, ids=lambda file: file.stem)
def test_damaged_headers_with_random_bytes(file: Path) -> None:
    """What follows a header that fits is all taken: states, words and tables of any bits."""
    golden, rng = read(file), np.random.default_rng(0)
    for _ in range(100):
        body = bytearray(golden.frame)
        start = int(rng.integers(0, len(body)))
        body[start:] = rng.bytes(len(body) - start)
        is_refused(bytes(body), golden.codes.shape)


@pytest.mark.parametrize("file", LARGE, ids=lambda file: file.stem)
def test_damaged_frames_of_many_lanes(file: Path) -> None:
    """Of which most is decoded by other instructions, that check no index: tables, words, states and streams."""
    golden, rng = read(file), np.random.default_rng(0)
    refused = 0
    for number in range(60):
        body = bytearray(golden.frame)
        start = int(rng.integers(12, len(body) if number % 2 else 12 + 80))
        width = int(rng.choice([1, 8, 100, len(body)]))
        body[start : start + width] = rng.bytes(len(body[start : start + width]))
        refused += is_refused(bytes(body), golden.codes.shape)
    assert refused > 50
    fields = header(golden.frame)
    for change in (-1, 1, -fields[4]):
        end = len(golden.frame) + 2 * change
        frame = struct.pack("<BBBBII", *fields[:4], fields[4] + change, 0) + golden.frame[12:end] + bytes(4)
        assert is_refused(frame[:end], golden.codes.shape)


def test_damaged_frames_of_other_shapes() -> None:
    for file in SMALL:
        golden = read(file)
        rows, columns = golden.codes.shape
        for shape in ((rows + 1, columns), (rows, columns + 1), (rows - 1, columns), (0, columns), (rows, 0)):
            assert is_refused(golden.frame, shape) or golden.frame[0] == ZEROS, file.stem


@pytest.mark.slow
def test_indices_of_damaged_frames_are_in_bounds(tmp_path: Path) -> None:
    """The tests above, with compiled code that checks every index."""
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "test_damaged",
    ]  # not this one
    variables = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(tests, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{2 * len(SMALL) + len(LARGE) + 1} passed" in done.stdout  # and one of other shapes


def small(kind: int) -> Golden:
    """A frame of one lane without low bits or a list."""
    return read(FOLDER / {INTEGERS: "integers-int8.json", LATTICE: "lattice-int8.json"}[kind])


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("kind", 4, "unknown kind 4/1/0/129; written by another version, or damaged"),
        ("kind", 255, "unknown kind"),
        ("size", 3, "unknown kind"),
        ("low", 25, "unknown kind"),
        ("lanes", 0, "unknown kind"),
        ("lanes", 65, "unknown kind"),
        ("lanes", 128, "unknown kind"),
        ("lanes", 128 + 65, "unknown kind"),
        ("kind", 0, "unknown kind"),
        ("words", (1 << 32) - 1, "its parts do not add up to its"),
        ("listed", (1 << 32) - 1, "cannot be of"),
        ("listed", 64, "its parts do not add up to its"),
        ("low", 24, "entries does not add up to 4096"),
    ],
)
def test_headers_that_lie(field: str, value: int, text: str) -> None:
    golden = small(LATTICE)
    fields = dict(zip(("kind", "size", "low", "lanes", "words", "listed"), header(golden.frame), strict=True))
    frame = struct.pack("<BBBBII", *(fields | {field: value}).values()) + golden.frame[12:]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=text):
            decode_frame(frame, golden.codes.shape)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def header(frame: bytes) -> tuple[int, ...]:
    return struct.unpack_from("<BBBBII", frame)


def test_zeros_are_nothing_but_a_header() -> None:
    frame = encode_frame(np.zeros((4, 4), np.int16))
    assert frame == bytes([0, 2]) + bytes(10)
    for other in (frame + b"\0", frame[:11], bytes([0, 2, 1]) + bytes(9), bytes([0, 2, 0, 65]) + bytes(8)):
        with pytest.raises(CheckpointError):
            decode_frame(other, (4, 4))


def test_a_list_of_another_length() -> None:
    golden = read(FOLDER / "integers-int32-list.json")
    fields = header(golden.frame)
    none = golden.frame[12 : -4 * fields[5]]
    for more, body in ((1, golden.frame[12:] + bytes(4)), (-1, golden.frame[12:-4]), (-fields[5], none)):
        frame = struct.pack("<BBBBII", *fields[:5], fields[5] + more) + body
        with pytest.raises(CheckpointError, match=f"a list of {fields[5] + more} codes has another length than needed"):
            decode_frame(frame, golden.codes.shape)
    other = decode_frame(golden.frame[:-4] + struct.pack("<i", -7), golden.codes.shape)
    assert (other != golden.codes).sum() == 1
    assert -7 in other


@pytest.mark.parametrize("kind", [INTEGERS, LATTICE])
def test_the_stream_must_end(kind: int) -> None:
    golden = small(kind)
    fields = header(golden.frame)
    longer = struct.pack("<BBBBII", *fields[:4], fields[4] + 1, 0) + golden.frame[12:] + bytes(2)
    shorter = struct.pack("<BBBBII", *fields[:4], fields[4] - 1, 0) + golden.frame[12:-2]
    for frame in (longer, shorter):
        with pytest.raises(CheckpointError, match="the stream does not end where it should"):
            decode_frame(frame, golden.codes.shape)


def test_memory_is_that_of_the_codes() -> None:
    """A few bytes may be many codes, but nothing more than these and a table is allocated for them."""
    codes = np.full((1024, 1024), 1, np.int8)
    codes[0, 0] = 0
    frame = encode_frame(codes)
    tracemalloc.start()
    decode_frame(frame, codes.shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < codes.nbytes + len(frame) + (1 << 18)


def test_threads_decode_at_once() -> None:
    rng = np.random.default_rng(0)
    all_codes = [make(rng, (256, 700), 3, dtype) for make in (integers, lattice_points) for dtype in DTYPES]
    frames = [encode_frame(codes) for codes in all_codes]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            (codes, pool.submit(decode_frame, frame, codes.shape))
            for _ in range(4)
            for frame, codes in zip(frames, all_codes, strict=True)
        ]
        for codes, job in jobs:
            np.testing.assert_array_equal(job.result(), codes)


@pytest.mark.parametrize("shape", [(64, 70), (31, 40), (5, 96)])
def test_points_of_the_transposed_lattice(shape: tuple[int, int]) -> None:
    """As calibration leaves them for weights that are multiplied transposed."""
    codes = np.ascontiguousarray(lattice_points(np.random.default_rng(0), shape[::-1], 1, np.int8).T)
    frame = encode_frame(codes)
    assert frame[0] == TURNED
    assert len(frame) == len(encode_frame(np.ascontiguousarray(codes.T)))
    out = np.full(shape, 77, np.int8)
    assert decode_frame(frame, shape, out) is out
    np.testing.assert_array_equal(out, codes)
    with pytest.raises(CheckpointError, match="do not add up"):
        decode_frame(frame[:-1], shape)
