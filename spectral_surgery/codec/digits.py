"""Small numbers that share bytes: digits of any base, and the low bits of codes.

The digits of one byte come from equal stretches of the array, so unpacking is a few whole-array operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[Any]  # int8, int16 or int32


def pack(digits: Bytes, base: int, each: int) -> Bytes:
    """Digits below ``base``, ``each`` of them to a byte: [n] to [ceil(n / each)]; ``base ** each`` is 256 at most."""
    stretch = -(-digits.size // each)
    padded = np.zeros(stretch * each, np.uint8)
    padded[: digits.size] = digits
    planes = padded.reshape(each, stretch)
    packed: Bytes = planes[-1].copy()
    for plane in planes[-2::-1]:  # Horner: the first stretch is the lowest digit
        packed *= np.uint8(base % 256)
        packed += plane
    return packed


def unpack(packed: Bytes, base: int, each: int, out: Bytes, less: int = 0) -> None:
    """The inverse of `pack`.

    Args:
        packed: bytes.
        out: where digits are written to, as many as it has room for; the last ones may be padding.
        less: subtracted from each, modulo 256.

    Raises:
        CheckpointError: when a byte does not come from digits below the base.
    """
    factor, shift = np.uint8(base % 256), np.uint8(less)
    whole = out if out.size == each * packed.size else np.empty(each * packed.size, np.uint8)
    *planes, last = whole.reshape(each, packed.size)
    rest = packed
    for plane in planes:
        higher = rest // factor
        np.multiply(higher, factor, out=plane)
        np.subtract(rest, plane, out=plane)
        if less:
            np.subtract(plane, shift, out=plane)
        rest = higher
    if rest.size and int(rest.max()) >= base:  # the others are remainders
        raise CheckpointError("spectral frame: a digit is out of range; the data is damaged. Fetch the file again.")
    np.subtract(rest, shift, out=last)
    if whole is not out:
        out[:] = whole[: out.size]


def low_size(count: int, bits: int) -> int:
    """Bytes of the low bits of ``count`` codes."""
    return sum(-(-count * width // 8) for width in widths(bits))


def split_low(codes: Codes, bits: int) -> tuple[Codes, bytes]:
    """Codes to ``(high, low)``: the nearest multiples of ``2 ** bits``, as factors, and the rest, as bytes."""
    half = 1 << (bits - 1)
    wide = np.dtype(f"i{2 * codes.itemsize}")
    high = (codes.astype(wide) + wide.type(half)) >> bits  # centred: rounds to nearest
    low = codes + codes.dtype.type(half)  # only its low bits are used: it may wrap
    parts, place = [], 0
    for width in widths(bits):
        digits = (low >> low.dtype.type(place)) & low.dtype.type((1 << width) - 1)
        parts.append(pack(digits.astype(np.uint8), 1 << width, 8 // width).tobytes())
        place += width
    return high.astype(codes.dtype), b"".join(parts)


def join_low(high: Codes, low: memoryview, bits: int) -> None:
    """The inverse of `split_low`, in place."""
    unsigned = high.view(f"u{high.itemsize}")  # wraps around instead of overflowing on the way
    unsigned *= unsigned.dtype.type(1 << bits)  # numpy multiplies small integers faster than it shifts them
    digits, start, place = np.empty(high.size, np.uint8), 0, 0
    for width in widths(bits):
        stop = start + low_size(high.size, width)
        unpack(np.frombuffer(low[start:stop], np.uint8), 1 << width, 8 // width, digits)
        unsigned += digits * unsigned.dtype.type(1 << place) if place else digits
        start, place = stop, place + width
    unsigned -= unsigned.dtype.type(1 << (bits - 1))


def widths(bits: int) -> list[int]:
    """Bits that can share a byte with others of their width, as few widths as add up."""
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]
