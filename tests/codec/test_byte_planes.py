"""Numbers of every kind come back bit for bit, in few bytes where their exponents repeat."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectral_surgery.codec.byte_planes import (
    COLUMNS,
    ROWS,
    Layout,
    centres_of,
    decode_planes,
    encode_planes,
    joined,
    joined_reference,
    layout_of,
    split,
)
from spectral_surgery.codec.frame_bytes import decode_frame, encode_frame
from spectral_surgery.errors import CheckpointError


def random_bits(size: int, count: int, seed: int = 0) -> np.ndarray:
    return np.frombuffer(np.random.default_rng(seed).bytes(size * count), f"<u{size}")


def weights(dtype: torch.dtype, count: int) -> np.ndarray:
    values = 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(0))
    if dtype.itemsize == 1:
        values = values * (448 / values.abs().max())
    return values.to(dtype).view(torch.uint8).numpy().view(f"u{dtype.itemsize}")


def coded(numbers: np.ndarray, *, turned: bool) -> tuple[list[bytes], Layout, tuple[int | None, ...]]:
    layout = layout_of(numbers.itemsize, len(numbers), turned=turned)
    centres = centres_of(split(numbers, turned))
    return encode_planes(numbers, layout, centres), layout, centres


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 31, 33, 1000, 4161])
def test_any_bits_come_back(size: int, count: int, turned: bool) -> None:
    for numbers in (random_bits(size, count), np.zeros(count, f"u{size}"), np.arange(count).astype(f"u{size}")):
        pieces, layout, centres = coded(numbers, turned=turned)
        np.testing.assert_array_equal(decode_planes(pieces, layout, centres, count), numbers)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_planes_are_joined_as_the_plain_way_does(size: int, turned: bool) -> None:
    numbers, centres = random_bits(size, 999), [7, 255, 0, 128, 1, 2, 3, 4][:size]
    planes = list(split(numbers, turned) - np.array(centres, np.uint8)[:, None])
    np.testing.assert_array_equal(joined(planes, centres, turned), numbers)
    np.testing.assert_array_equal(joined_reference(planes, centres, turned), numbers)


def test_of_floating_numbers_the_first_plane_is_the_exponent() -> None:
    values = torch.tensor([1.0, -1.0, 0.5, -0.25, 0.0])
    exponents = [127, 127, 126, 125, 0]
    for dtype in (torch.bfloat16, torch.float32):
        numbers = values.to(dtype).view(torch.uint8).numpy().view(f"u{dtype.itemsize}")
        assert split(numbers, turned=True)[0].tolist() == exponents


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.bfloat16, 0.67), (torch.float16, 0.86), (torch.float32, 0.84), (torch.float8_e4m3fn, 0.84)],
    ids=str,
)
def test_weights_take_fewer_bytes(dtype: torch.dtype, most: float) -> None:
    numbers = weights(dtype, COLUMNS * ROWS)
    pieces, _, centres = coded(numbers, turned=True)
    assert sum(map(len, pieces)) < most * numbers.nbytes
    assert all(centre is None for centre in centres[1:])


def test_nan_infinity_and_denormals_keep_their_bits() -> None:
    odd = np.array([0x7FC1, 0xFFC1, 0x7F81, 0xFF80, 0x7F80, 0x0001, 0x8001, 0x8000, 0x0000, 0x7F7F], np.uint16)
    numbers = np.concatenate((weights(torch.bfloat16, 5000), odd, weights(torch.bfloat16, 5000)))
    pieces, layout, centres = coded(numbers, turned=True)
    np.testing.assert_array_equal(decode_planes(pieces, layout, centres, len(numbers)), numbers)
    assert sum(map(len, pieces)) < 0.75 * numbers.nbytes


def test_damage_is_found_where_a_size_does_not_fit() -> None:
    numbers = weights(torch.bfloat16, 5000)
    pieces, layout, centres = coded(numbers, turned=True)
    with pytest.raises(CheckpointError):
        decode_planes([pieces[0][:-1], pieces[1]], layout, centres, len(numbers))
    with pytest.raises(CheckpointError, match="lossless frame: 4999 bytes of 5000 numbers"):
        decode_planes([pieces[0], pieces[1][:-1]], layout, centres, len(numbers))
    wide = encode_frame(np.full(layout.shape(5000), 1000, np.int16))
    with pytest.raises(CheckpointError, match="its codes are no bytes"):
        decode_planes([wide, pieces[1]], layout, centres, len(numbers))


def test_plain_frames_are_integers_without_low_bits() -> None:
    codes = np.random.default_rng(0).integers(-60, 60, (64, 300)).astype(np.int8)
    usual, plain = encode_frame(codes), encode_frame(codes, plain=True)
    assert plain[:3] == bytes([1, 1, 0])
    assert usual[2] > 0
    np.testing.assert_array_equal(decode_frame(plain, codes.shape), codes)
