"""How small integers lie in memory: as planes of bytes, nibbles and single bits. One table of layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec.quantized import INT8_MAX, INT12_MAX
from spectral_surgery.registry import Table


@dataclass(frozen=True)
class Plane:
    """A number of few bits for each weight.

    Attributes:
        bits: of a number.
        low: the least of them.
        dtype: of what they are packed in.
        pack: [r, I] int8 to [r, `width`].
        unpack: the inverse, of I columns.
    """

    bits: int
    low: int
    dtype: torch.dtype
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]

    def width(self, columns: int) -> int:
        """Bytes of a row."""
        return -(-columns * self.bits // 8)


def _pack_nibbles(numbers: Tensor) -> Tensor:
    """The low nibbles are the first half of the columns, the high ones the rest."""
    half = -(-numbers.shape[1] // 2)
    packed = numbers[:, :half] & 15
    packed[:, : numbers.shape[1] - half] |= numbers[:, half:] << 4
    return packed


def _unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    low = packed.bitwise_left_shift(4).bitwise_right_shift(4)  # keeps the sign
    return torch.cat([low, packed.bitwise_right_shift(4)], 1)[:, :columns].contiguous()


def _pack_bits(numbers: Tensor) -> Tensor:
    """In order of columns, the first one the lowest bit of a byte."""
    return torch.from_numpy(np.packbits(numbers.numpy(), axis=1, bitorder="little"))


def _unpack_bits(packed: Tensor, columns: int) -> Tensor:
    bits = (packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(1)[:, :columns].to(torch.int8)


BYTES = Plane(8, -INT8_MAX, torch.int8, lambda numbers: numbers, lambda packed, _: packed)
NIBBLES = Plane(4, -8, torch.int8, _pack_nibbles, _unpack_nibbles)
BITS = Plane(1, 0, torch.uint8, _pack_bits, _unpack_bits)


@dataclass(frozen=True)
class Layout:
    """One row of LAYOUTS.

    Attributes:
        name: of the resident form.
        planes: a number is that of the first one, shifted by the bits of the others, plus theirs.
        limits: the least and the largest number that is held.
        most_beyond: at most one number in this many may be an outlier.
        points: whether numbers are codes, for which a `Grid` has levels; else they are levels.
        help: what it costs, in one line.
        close: stored bits a weight; with fewer, hardly any number is an outlier.
    """

    name: str
    planes: tuple[Plane, ...]
    limits: tuple[int, int]
    most_beyond: int
    points: bool
    help: str
    close: float = 0.0

    @property
    def wide(self) -> bool:
        """Whether numbers are beyond int8."""
        return self.limits[1] > INT8_MAX

    def split(self, numbers: Tensor) -> list[Tensor]:
        """The planes, packed, of numbers [r, I] within the limits."""
        packed: list[Tensor] = []
        for plane in reversed(self.planes[1:]):
            higher = (numbers - plane.low).bitwise_right_shift_(plane.bits)
            packed.insert(0, plane.pack((numbers - (higher << plane.bits)).to(torch.int8)))
            numbers = higher
        return [self.planes[0].pack(numbers.to(torch.int8)), *packed]

    def planes_of(self, rows: Tensor, columns: int) -> list[Tensor]:
        """The planes, contiguous, of rows that have one behind the other: [r, bytes of a row] int8."""
        parts = rows.split([plane.width(columns) for plane in self.planes], 1)
        return [part.contiguous().view(plane.dtype) for plane, part in zip(self.planes, parts, strict=True)]

    def join(self, packed: Sequence[Tensor], columns: int) -> Tensor:
        """The inverse: [r, I] int8, or int16 of `wide` ones."""
        dtype = torch.int16 if self.wide else torch.int8
        digits = [plane.unpack(part, columns).to(dtype) for plane, part in zip(self.planes, packed, strict=True)]
        later = zip(self.planes[1:], digits[1:], strict=True)
        return reduce(lambda number, digit: (number << digit[0].bits) + digit[1], later, digits[0])

    def most_bytes(self, weights: int, stored: int) -> int:
        """Bytes of a form at most: of planes, and a place of 4 bytes and a level of 1 or 4 for each outlier."""
        held, outlier = sum(plane.width(weights) for plane in self.planes), 5 if self.points else 8
        return held + (outlier * (weights // self.most_beyond) if 8 * stored > self.close * weights else 0)


LAYOUTS = Table(
    "layout",
    (
        Layout("int8", (BYTES,), (-INT8_MAX, INT8_MAX), 64, False, "one byte a weight; the fastest", close=6),
        Layout(
            "int12",
            (BYTES, NIBBLES),
            (-INT12_MAX, INT12_MAX),
            1 << 12,
            False,
            f"a byte and a half a weight, for codes up to {INT12_MAX}",
        ),
        Layout("int4", (NIBBLES,), (-8, 7), 64, True, "half a byte a weight, where codes but a few are -8 to 7"),
        Layout("int5", (NIBBLES, BITS), (-16, 15), 64, True, "five bits a weight, where codes but a few are -16 to 15"),
    ),
)
