"""Numbers of any kind without loss: the planes of bytes that repeat as frames of the coder, the others as they are.

A frame has some numbers, and decodes alone. Each of its planes is seen as a matrix [r, I], row after row, the last row
filled up with zeros. A plane that is coded has a centre, which is taken off each byte modulo 256: what is left, seen as
int8, is what `frame_bytes` codes. The idea: exponents of trained weights take 2.6 bits of their 8, and nothing is to be
had of most mantissas. Source: ZipNN, arXiv 2411.05239; DFloat11, arXiv 2504.11651.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.codec.frame_bytes import decode_frame, encode_frame
from spectral_surgery.errors import CheckpointError

Bytes = npt.NDArray[Any]
Centres = tuple[int | None, ...]  # of each plane, None for one that is stored as it is

COLUMNS, ROWS = 4160, 128  # of a large frame: no power of two, whose lines would share a few lines of the cache
_SMALL = 32  # rows of a frame of few numbers
_WORTH = 0.97  # of a byte: planes that take more are stored as they are


@dataclass(frozen=True)
class Layout:
    """How the numbers of a tensor are cut into frames.

    Attributes:
        size: bytes of a number: 1, 2, 4 or 8.
        turned: whether the sign goes to the end.
        columns: I of the matrices.
        per_frame: numbers of a frame; the last one may have fewer.
    """

    size: int
    turned: bool
    columns: int
    per_frame: int

    def shape(self, numbers: int) -> tuple[int, int]:
        """[r, I] of the planes of so many numbers."""
        return -(-numbers // self.columns), self.columns


def layout_of(size: int, numbers: int, *, turned: bool) -> Layout:
    """The layout of a tensor of so many numbers."""
    columns = COLUMNS if numbers >= COLUMNS * _SMALL else max(1, -(-numbers // _SMALL))
    return Layout(size, turned, columns, columns * (ROWS if columns == COLUMNS else _SMALL))


def centres_of(planes: Bytes) -> Centres:
    """Which planes to code, and their centres, by the bytes of some numbers: [k, n] uint8."""
    return tuple(_centre(np.bincount(plane, minlength=256)) for plane in planes)


def _centre(counts: Bytes) -> int | None:
    """The byte that becomes zero: the most frequent of those that leave the fewest codes beyond all symbols."""
    total = int(counts.sum())
    used = counts[counts > 0]
    if float(-(used * np.log2(used / total)).sum()) > 8 * _WORTH * total:
        return None
    twice = np.concatenate((counts, counts))
    beyond = np.array([int(twice[c + 126 : c + 131].sum()) for c in range(256)])  # 126 to 128, and -127 and -126
    best = beyond == beyond.min()
    return int(np.where(best, counts, -1).argmax())


def encode_planes(numbers: Bytes, layout: Layout, centres: Centres) -> list[bytes]:
    """The planes of a frame, most significant first.

    Args:
        numbers: [n] uint8, uint16, uint32 or uint64.
        layout: of the tensor.
        centres: of each plane.

    Raises:
        CheckpointError: when they do not come back.
    """
    rows, columns = shape = layout.shape(len(numbers))
    pieces = []
    for plane, centre in zip(split(numbers, layout.turned), centres, strict=True):
        if centre is None:
            pieces.append(plane.tobytes())
            continue
        codes = np.zeros(rows * columns, np.int8)
        codes[: len(plane)] = (plane - np.uint8(centre)).view(np.int8)
        pieces.append(encode_frame(codes.reshape(shape), plain=True))
    if not np.array_equal(decode_planes(pieces, layout, centres, len(numbers)), numbers):
        raise CheckpointError("encode: numbers do not come back as they were. This is a bug: please report it.")
    return pieces


def decode_planes(
    pieces: Sequence[bytes | memoryview], layout: Layout, centres: Centres, numbers: int, out: Bytes | None = None
) -> Bytes:
    """The numbers of a frame: [n] unsigned integers of their size. The inverse of `encode_planes`.

    Args:
        pieces: one for each plane.
        layout: of the tensor.
        centres: of each plane.
        numbers: of the frame.
        out: [n] where they are written to; None for an array of their own.

    Raises:
        CheckpointError: when a piece is damaged.
    """
    planes = []
    for piece, centre in zip(pieces, centres, strict=True):
        if centre is None:
            plane = np.frombuffer(piece, np.uint8)
        else:
            codes = decode_frame(piece, layout.shape(numbers))
            if codes.dtype != np.int8:
                raise CheckpointError("lossless frame: its codes are no bytes; the data is damaged. Fetch it again.")
            plane = codes.reshape(-1)[:numbers].view(np.uint8)
        if len(plane) != numbers:
            raise CheckpointError(
                f"lossless frame: {len(plane)} bytes of {numbers} numbers; the data is damaged. Fetch it again."
            )
        planes.append(plane)
    return joined(planes, [centre or 0 for centre in centres], layout.turned, out)


def split(numbers: Bytes, turned: bool) -> Bytes:
    """Planes of numbers: [n] unsigned integers to [k, n] uint8, most significant first."""
    bits = 8 * numbers.itemsize
    if turned:
        kind = numbers.dtype.type
        numbers = (numbers << kind(1)) | (numbers >> kind(bits - 1))
    parts = numbers.astype(numbers.dtype.newbyteorder(">")).view(np.uint8)
    return np.ascontiguousarray(parts.reshape(len(numbers), -1).T)


def joined(planes: Sequence[Bytes], centres: Sequence[int], turned: bool, out: Bytes | None = None) -> Bytes:
    """Numbers of planes [n] uint8, with their centres added: the inverse of `split`."""
    from spectral_surgery.kernels.planes import join_four, join_one, join_two

    out = np.empty(len(planes[0]), f"u{len(planes)}") if out is None else out
    added = np.array(centres, np.uint8)
    if len(planes) == 1:
        join_one(planes[0], added[0], turned, out)
    elif len(planes) == 2:
        join_two(planes[0], planes[1], added, turned, out)
    elif len(planes) == 4:
        join_four(planes[0], planes[1], planes[2], planes[3], added, turned, out)
    else:
        out[:] = joined_reference(planes, centres, turned)
    return out


def joined_reference(planes: Sequence[Bytes], centres: Sequence[int], turned: bool) -> Bytes:
    """`joined`, plainly, for numbers of any size."""
    kind = np.dtype(f"u{len(planes)}").type
    out = np.zeros(len(planes[0]), kind)
    for plane, centre in zip(planes, centres, strict=True):
        out = (out << kind(8 if len(planes) > 1 else 0)) | (plane + np.uint8(centre)).astype(kind)
    return (out >> kind(1)) | (out << kind(8 * len(planes) - 1)) if turned else out
