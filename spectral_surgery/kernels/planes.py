"""Bytes of numbers, sorted by their weight within a number: planes, and back.

A number of k bytes has k planes, the most significant byte first. Of a floating number the sign goes to the end before,
a rotation by one bit to the left: then the first plane begins with the exponent, which is what repeats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels.compile import kernel

Bytes = npt.NDArray[Any]


@kernel
def join_one(first: Bytes, centre: int, turned: bool, out: Bytes) -> None:
    """Numbers of one byte: ``first`` [n] uint8 plus centre, modulo 256, to ``out`` [n] uint8."""
    for i in range(out.size):
        x = np.uint8(first[i] + centre)
        out[i] = np.uint8((x >> 1) | (x << 7)) if turned else x


@kernel
def join_two(first: Bytes, second: Bytes, centres: Bytes, turned: bool, out: Bytes) -> None:
    """Numbers of two bytes: planes [n] uint8 plus their centres, modulo 256, to ``out`` [n] uint16."""
    a, b = np.uint8(centres[0]), np.uint8(centres[1])
    for i in range(out.size):
        x = np.uint16(np.uint16(np.uint8(first[i] + a)) << np.uint16(8)) | np.uint16(np.uint8(second[i] + b))
        out[i] = np.uint16((x >> np.uint16(1)) | (x << np.uint16(15))) if turned else x


@kernel
def join_four(
    first: Bytes, second: Bytes, third: Bytes, fourth: Bytes, centres: Bytes, turned: bool, out: Bytes
) -> None:
    """Numbers of four bytes: planes [n] uint8 plus their centres, modulo 256, to ``out`` [n] uint32."""
    a, b, c, d = np.uint8(centres[0]), np.uint8(centres[1]), np.uint8(centres[2]), np.uint8(centres[3])
    for i in range(out.size):
        x = np.uint32(np.uint8(first[i] + a)) << np.uint32(24)
        x |= np.uint32(np.uint8(second[i] + b)) << np.uint32(16)
        x |= np.uint32(np.uint8(third[i] + c)) << np.uint32(8)
        x |= np.uint32(np.uint8(fourth[i] + d))
        out[i] = np.uint32((x >> np.uint32(1)) | (x << np.uint32(31))) if turned else x
