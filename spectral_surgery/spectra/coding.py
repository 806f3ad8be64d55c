"""Integer codes of one frame, as bytes and back.

A frame is a run of quantiser codes that decodes alone. Codes near zero are by far the most frequent, and zstd's
Huffman coder spends at least one bit on every byte, so several codes share a byte: ``base ** digits`` of them fit in
256. Codes beyond the base saturate at its ends, and an overflow list says where and how much is missing, so that rare
large codes do not force a large base on all others. Three families of layouts cover all rates, and the smallest one is
found by trying them on a frame:

* ``packed``: every code is a digit. Codes wider than a digit are first split into raw low bit planes and a packed
  high part.
* ``bitmap``: one bit per code says whether it is zero, and only the non-zero codes become digits.
* ``gaps``: the same for sparser codes, with the lengths of the runs of zeros in place of the bits.

Digits of one byte come from ``digits`` equal stretches of the frame, so unpacking is a few whole-array operations.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zstandard

from spectral_surgery.errors import CheckpointError, ConfigError, LimitError
from spectral_surgery.spectra.places import Places, most_bytes, pack_places, unpack_places

Codes = npt.NDArray[Any]  # int8, int16 or int32
Bytes = npt.NDArray[np.uint8]
Kind = Literal["packed", "bitmap", "gaps"]

# Matches only get in the way of Huffman coding here: the smallest tables and the longest minimal match make them rare.
_ZSTD = zstandard.ZstdCompressionParameters(
    window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
_HEADER = struct.Struct("<BBBBB")  # layout, digits per byte, low bit planes, bytes of a code, overflow bytes
_MAX_WINDOW = 1 << 27
_OF_THREAD = threading.local()  # a decompressor for each: to make one takes longer than a small section does
_SCATTER_HANDICAP = 0.08  # codes written one by one decode ten times slower: layouts without them win near-ties


@dataclass(frozen=True)
class Layout:
    """How the codes of a frame become bytes.

    Attributes:
        kind: ``packed``, ``bitmap`` or ``gaps``.
        digits: codes per byte.
        low_planes: low bits of every code stored raw (``packed`` only).
    """

    kind: Kind
    digits: int
    low_planes: int = 0

    @property
    def base(self) -> int:
        """Number of values a digit can take: odd and signed when packed, sign and magnitude of a non-zero code else."""
        return _BASES[self.kind][self.digits]

    @property
    def limit(self) -> int:
        """Largest magnitude a digit holds; what a code has beyond it goes to the overflow list."""
        return self.base // 2

    @property
    def is_sparse(self) -> bool:
        """Whether only non-zero codes become digits."""
        return self.kind != "packed"


_SPARSE_BASES = {1: 254, 2: 16, 3: 6, 4: 4}
_BASES: dict[Kind, dict[int, int]] = {
    "packed": {1: 255, 2: 15, 3: 5, 5: 3},
    "bitmap": _SPARSE_BASES,
    "gaps": _SPARSE_BASES,
}
_KINDS = tuple(_BASES)


def entropy(codes: Codes) -> float:
    """Order-0 entropy of integer codes, in bits per code."""
    _, counts = np.unique(codes, return_counts=True)
    p = counts / codes.size
    return float(-(p * np.log2(p)).sum())


def choose_layout(codes: Codes) -> Layout:
    """Find the layout that stores these codes in the fewest bytes, by trying every plausible one.

    Args:
        codes: [n] signed integers, typical of the frames to come.

    Returns:
        The best layout; one that decodes faster wins where two differ by less than eight percent of the share of codes
        that the other has to place one by one.
    """
    scores = {layout: len(encode_frame(codes, layout)) * _handicap(codes, layout) for layout in _candidates(codes)}
    return min(scores, key=lambda layout: scores[layout])


def _handicap(codes: Codes, layout: Layout) -> float:
    scattered = np.count_nonzero(codes) if layout.is_sparse else 0
    return 1 + _SCATTER_HANDICAP * scattered / max(codes.size, 1)


def _candidates(codes: Codes) -> Iterator[Layout]:
    # like a standard deviation, but blind to outliers: those go to the overflow list
    spread = float(np.quantile(np.abs(codes.astype(np.int64)), 0.95)) / 2 if codes.size else 0.0
    if spread < 100:
        yield Layout("packed", 1)
    for planes in range(31):
        if spread / 2**planes < 5:
            yield Layout("packed", 2, planes)
            if planes and spread / 2**planes < 1.5:
                break
    if spread < 2:
        yield Layout("packed", 3)
        yield Layout("packed", 5)
    if spread < 5 and np.count_nonzero(codes) < 0.6 * codes.size:
        for digits in _SPARSE_BASES:
            yield Layout("bitmap", digits)
            yield Layout("gaps", digits)


def encode_frame(codes: Codes, layout: Layout) -> bytes:
    """Encode the codes of one frame.

    Args:
        codes: [n] int8, int16 or int32.
        layout: how to lay them out; any layout with fewer low planes than a code has bits holds any codes.

    Returns:
        The frame: a header, then its sections.

    Raises:
        ConfigError: when codes is not a flat signed integer array.
    """
    if codes.ndim != 1 or codes.dtype not in (np.int8, np.int16, np.int32):
        raise ConfigError(f"encode_frame: codes are {codes.dtype} {codes.shape}; int8, int16 or int32 [n] is accepted.")
    raw = b""
    high: Codes = codes
    if layout.low_planes:
        high, raw = _split_low_planes(codes, layout.low_planes)
    sections: list[bytes] = []
    if layout.is_sparse:
        significant = high != 0
        packed = np.packbits(significant) if layout.kind == "bitmap" else pack_places(np.flatnonzero(significant))
        sections.append(_compress(packed))
        high = high[significant]
    clipped = np.clip(high, -layout.limit, layout.limit)
    if layout.is_sparse:
        digits = (2 * (np.abs(clipped) - 1) + (clipped < 0)).astype(np.uint8)
    else:
        digits = clipped.astype(np.uint8) + np.uint8(layout.limit)  # modulo 256 on purpose
    sections.append(_compress(_pack(digits, layout)))
    beyond = np.flatnonzero(high != clipped)
    width = 0
    if beyond.size:
        rest = np.abs(high[beyond].astype(np.int64)) - layout.limit
        width = 1 + (int(rest.max()).bit_length() - 1) // 8
        sections.append(_compress(pack_places(beyond)))
        sections += [_compress((rest >> (8 * i)).astype(np.uint8)) for i in range(width)]
    header = _HEADER.pack(_KINDS.index(layout.kind), layout.digits, layout.low_planes, codes.itemsize, width)
    lengths = struct.pack(f"<{len(sections)}I", *map(len, sections))
    return b"".join((header, lengths, *sections, raw))


def decode_frame(frame: bytes | memoryview, count: int, out: Codes | None = None) -> Codes:
    """Decode one frame; the inverse of `encode_frame`.

    Every size is checked against ``count`` before anything of that size is allocated.

    Args:
        frame: the bytes of one frame.
        count: number of codes it must hold.
        out: [count] int8, where int8 codes are written to.

    Returns:
        [count] int8, int16 or int32, as encoded; ``out`` itself where codes are int8 and it is given.

    Raises:
        CheckpointError: when the frame is damaged.
        LimitError: when it claims more data than ``count`` codes can need.
    """
    layout, itemsize, parts, raw = _parse(frame, count)
    sections = _Sections(parts)
    dtype = np.dtype(f"i{itemsize}")
    if itemsize != 1:
        out = None
    if layout.is_sparse:
        places = _significant(sections, count, layout)
        high = np.empty(count, dtype) if out is None else out
        high.fill(0)
        high[places] = _decode_values(sections, len(places), layout, dtype)
        return high
    high = _decode_values(sections, count, layout, dtype, out)
    if layout.low_planes:
        _join_low_planes(high, raw, layout.low_planes)
    return high


class _Sections:
    """The compressed sections of a frame, one after the other."""

    def __init__(self, parts: list[memoryview]) -> None:
        self._parts = iter(parts)
        self.left = len(parts)

    def take(self, size: int, *, exactly: bool = True) -> Bytes:
        """The next one: ``size`` bytes, or at most so many where not exactly."""
        section = next(self._parts)
        self.left -= 1
        try:
            declared = zstandard.frame_content_size(section)
            if not (declared == size or (not exactly and 0 <= declared < size)):
                wanted = f"{size} belong" if exactly else f"at most {size} belong"
                raise LimitError(
                    f"spectral frame: a section declares {declared} bytes where {wanted}; only sizes that fit are "
                    "accepted. The data is damaged or hostile: do not use it."
                )
            # exactly the declared size, or an error
            return np.frombuffer(_decompressor().decompress(section, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError as error:
            raise CheckpointError(
                f"spectral frame: zstd says {error}; the data is damaged. Fetch the file again."
            ) from None

    def places(self, count: int) -> Places:
        """The next one, as places below ``count``."""
        return unpack_places(self.take(most_bytes(count), exactly=False), count)


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_OF_THREAD, "zstd"):
        _OF_THREAD.zstd = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    found: zstandard.ZstdDecompressor = _OF_THREAD.zstd
    return found


def _significant(sections: _Sections, count: int, layout: Layout) -> Places:
    if layout.kind == "gaps":
        return sections.places(count)
    return np.flatnonzero(np.unpackbits(sections.take(-(-count // 8)), count=count).view(np.bool_))


def _decode_values(
    sections: _Sections, count: int, layout: Layout, dtype: np.dtype[Any], out: Codes | None = None
) -> Codes:
    packed = sections.take(-(-count // layout.digits))
    whole = np.empty(count, np.int8) if out is None else out
    digits = whole.view(np.uint8)
    if layout.is_sparse:
        _unpack(packed, layout, digits)
        negative = -(digits & 1).view(np.int8)
        digits >>= 1
        digits += 1
        values = whole
        values ^= negative  # two's complement, without branches
        values -= negative
    else:
        _unpack(packed, layout, digits, less=layout.limit)
        values = whole
    wide: Codes = values.astype(dtype, copy=False)
    if sections.left:
        _add_overflow(wide, sections)
    return wide


def _add_overflow(values: Codes, sections: _Sections) -> None:
    places = sections.places(len(values))
    rest = sections.take(len(places)).astype(np.int64)
    for i in range(sections.left):
        rest += sections.take(len(places)).astype(np.int64) << (8 * i + 8)
    ends = values[places].astype(np.int64)
    ends += np.sign(ends) * rest
    values[places] = ends  # may wrap, which the next line sees
    if (values[places] != ends).any():
        raise CheckpointError(
            f"spectral frame: a code exceeds {values.dtype}; the data is damaged. Fetch the file again."
        )


def _parse(frame: bytes | memoryview, count: int) -> tuple[Layout, int, list[memoryview], memoryview]:
    view = memoryview(frame)
    damaged = "the data is damaged. Fetch the file again."
    if len(view) < _HEADER.size:
        raise CheckpointError(f"spectral frame: {len(view)} bytes are too few for a header; {damaged}")
    kind, digits, planes, itemsize, width = _HEADER.unpack_from(view)
    if kind >= len(_KINDS) or digits not in _BASES[_KINDS[kind]] or itemsize not in (1, 2, 4):
        raise CheckpointError(f"spectral frame: unknown layout {kind}/{digits}/{itemsize}; {damaged}")
    if width > itemsize or planes >= 8 * itemsize or (planes and _KINDS[kind] != "packed"):
        raise CheckpointError(f"spectral frame: impossible layout {kind}/{planes}/{width}; {damaged}")
    sections = (1 if _KINDS[kind] == "packed" else 2) + (1 + width if width else 0)
    start = _HEADER.size + 4 * sections
    raw = planes * -(-count // 8)
    if len(view) < start:
        raise CheckpointError(f"spectral frame: {len(view)} bytes are too few for a header; {damaged}")
    lengths = struct.unpack_from(f"<{sections}I", view, _HEADER.size)
    if start + sum(lengths) + raw != len(view):
        raise CheckpointError(f"spectral frame: sections do not add up to its {len(view)} bytes; {damaged}")
    parts: list[memoryview] = []
    for length in lengths:
        parts.append(view[start : start + length])
        start += length
    return Layout(_KINDS[kind], digits, planes), itemsize, parts, view[start:]


def _compress(data: Bytes) -> bytes:
    return zstandard.ZstdCompressor(compression_params=_ZSTD).compress(data.tobytes())


def _pack(digits: Bytes, layout: Layout) -> Bytes:
    stretch = -(-digits.size // layout.digits)
    padded = np.zeros(stretch * layout.digits, np.uint8)
    padded[: digits.size] = digits
    planes = padded.reshape(layout.digits, stretch)
    packed: Bytes = planes[-1].copy()
    for plane in planes[-2::-1]:  # Horner: the first stretch is the lowest digit
        packed *= np.uint8(layout.base % 256)
        packed += plane
    return packed


def _unpack(packed: Bytes, layout: Layout, out: Bytes, less: int = 0) -> None:
    """Write digits, each less a number modulo 256: as many as ``out`` has room for, the last ones may be padding."""
    base, shift = np.uint8(layout.base), np.uint8(less)
    whole = out if out.size == layout.digits * packed.size else np.empty(layout.digits * packed.size, np.uint8)
    *planes, last = whole.reshape(layout.digits, packed.size)
    rest = packed
    for plane in planes:
        higher = rest // base
        np.multiply(higher, base, out=plane)
        np.subtract(rest, plane, out=plane)
        if less:
            np.subtract(plane, shift, out=plane)
        rest = higher
    if rest.size and int(rest.max()) >= layout.base:  # the others are remainders
        raise CheckpointError("spectral frame: a digit is out of range; the data is damaged. Fetch the file again.")
    np.subtract(rest, shift, out=last)
    if whole is not out:
        out[:] = whole[: out.size]


def _split_low_planes(codes: Codes, planes: int) -> tuple[Codes, bytes]:
    half = 1 << (planes - 1)
    wide = np.dtype(f"i{2 * codes.itemsize}")
    high = (codes.astype(wide) + wide.type(half)) >> planes  # centred: the high part rounds to nearest
    low = codes + codes.dtype.type(half)  # only its low bits are used: it may wrap
    if planes <= 8:
        low = low.view(f"u{codes.itemsize}").astype(np.uint8)
    raw = b"".join(np.packbits((low & low.dtype.type(1 << i)) != 0).tobytes() for i in range(planes))
    return high.astype(codes.dtype), raw


def _join_low_planes(high: Codes, raw: memoryview, planes: int) -> None:
    size = len(raw) // planes
    unsigned = high.view(f"u{high.itemsize}")  # wraps around instead of overflowing on the way
    unsigned *= unsigned.dtype.type(1 << planes)  # numpy multiplies small integers ten times faster than it shifts them
    for i in range(planes):
        bits = np.unpackbits(np.frombuffer(raw[i * size : (i + 1) * size], np.uint8), count=high.size)
        unsigned += bits * unsigned.dtype.type(1 << i)
    unsigned -= unsigned.dtype.type(1 << (planes - 1))
