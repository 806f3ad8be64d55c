"""Integer codes of one frame, as bytes and back.

A frame is a run of quantiser codes that decodes alone. Codes near zero are by far the most frequent, and zstd's
Huffman coder spends at least one bit on every byte, so several codes share a byte: ``base ** digits`` of them fit in
256. Codes beyond the base saturate at its ends, and an overflow list says where and how much is missing, so that rare
large codes do not force a large base on all others. Four families of layouts cover all rates, and the smallest one is
found by trying them on a frame:

* ``packed``: every code is a digit.
* ``split``: codes are split into low bits, which are stored as they are, and a high part, which is packed.
* ``bitmap``: one bit per code says whether it is zero, and only the non-zero codes become digits.
* ``gaps``: the same for sparser codes, with the lengths of the runs of zeros in place of the bits.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zstandard

from spectral_surgery.codec.digits import Bytes, Codes, join_low, low_size, pack, split_low, unpack, widths
from spectral_surgery.codec.gaps import Places, most_bytes, pack_places, unpack_places
from spectral_surgery.errors import CheckpointError, ConfigError, LimitError

Kind = Literal["packed", "bitmap", "gaps", "split"]

# Matches only get in the way of Huffman coding here: the smallest tables and the longest minimal match make them rare.
_ZSTD = zstandard.ZstdCompressionParameters(
    window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
_HEADER = struct.Struct("<BBBBB")  # layout, digits per byte, low bits, bytes of a code, overflow bytes
_MAX_WINDOW = 1 << 27
_OF_THREAD = threading.local()  # a decompressor for each: to make one takes longer than a small section does
# Nanoseconds that decoding a code takes, measured on one core: for each bit of Huffman coding, for taking a byte apart,
# and for writing a code to its place. Bytes are worth more: a layout may be 4 % larger if it saves a whole nanosecond.
_HUFFMAN_BIT, _APART, _PLACED = 0.165, 0.2, 2.0
_BYTES_PER_NANOSECOND = 0.04


@dataclass(frozen=True)
class Layout:
    """How the codes of a frame become bytes.

    Attributes:
        kind: ``packed``, ``bitmap``, ``gaps`` or ``split``.
        digits: codes per byte.
        low_bits: of every code, stored as they are (``split`` only).
    """

    kind: Kind
    digits: int
    low_bits: int = 0

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
        return self.kind in ("bitmap", "gaps")


_SPARSE_BASES = {1: 254, 2: 16, 3: 6, 4: 4}
_BASES: dict[Kind, dict[int, int]] = {
    "packed": {1: 255, 2: 15, 3: 5, 5: 3},
    "bitmap": _SPARSE_BASES,
    "gaps": _SPARSE_BASES,
    "split": {2: 15},
}
_KINDS = tuple(_BASES)


def entropy(codes: Codes) -> float:
    """Order-0 entropy of integer codes, in bits per code."""
    _, counts = np.unique(codes, return_counts=True)
    p = counts / codes.size
    return float(-(p * np.log2(p)).sum())


def choose_layout(codes: Codes) -> Layout:
    """Find the layout that stores these codes in the fewest bytes, by trying every plausible one.

    Returns the best layout; where two differ by little, the one that decodes faster. ``codes`` is [n] signed integers,
    typical of the frames to come.
    """
    scores = {layout: _cost(codes, layout) for layout in _candidates(codes)}
    return min(scores, key=lambda layout: scores[layout])


def _cost(codes: Codes, layout: Layout) -> float:
    count = max(codes.size, 1)
    bits = 8 * len(encode_frame(codes, layout)) / count
    apart = (layout.digits > 1) + len(widths(layout.low_bits))
    nanoseconds = _HUFFMAN_BIT * (bits - layout.low_bits) + _APART * apart
    if layout.is_sparse:
        nanoseconds += _PLACED * np.count_nonzero(codes) / count
    return bits * (1 + _BYTES_PER_NANOSECOND * nanoseconds)


def _candidates(codes: Codes) -> Iterator[Layout]:
    # like a standard deviation, but blind to outliers: those go to the overflow list
    spread = float(np.quantile(np.abs(codes.astype(np.int64)), 0.95)) / 2 if codes.size else 0.0
    if spread < 400:
        yield Layout("packed", 1)
    if spread < 5:
        yield Layout("packed", 2)
    for bits in range(1, 31):
        if spread / 2**bits < 5:
            yield Layout("split", 2, bits)
            if spread / 2**bits < 1.5:
                break
    if spread < 2:
        yield Layout("packed", 3)
        yield Layout("packed", 5)
    if spread < 100 and np.count_nonzero(codes) < 0.6 * codes.size:
        for digits in _SPARSE_BASES if spread < 5 else (1,):
            yield Layout("bitmap", digits)
            yield Layout("gaps", digits)


def encode_frame(codes: Codes, layout: Layout) -> bytes:
    """Encode the codes of one frame. Returns the frame: a header, then its sections.

    Args:
        codes: [n] int8, int16 or int32.
        layout: how to lay them out; any layout with fewer low bits than a code has holds any codes.

    Raises:
        ConfigError: when codes is not a flat signed integer array.
    """
    if codes.ndim != 1 or codes.dtype not in (np.int8, np.int16, np.int32):
        raise ConfigError(f"encode_frame: codes are {codes.dtype} {codes.shape}; expected int8, int16 or int32 [n].")
    raw = b""
    high: Codes = codes
    if layout.low_bits:
        high, raw = split_low(codes, layout.low_bits)
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
    sections.append(_compress(pack(digits, layout.base, layout.digits)))
    beyond = np.flatnonzero(high != clipped)
    width = 0
    if beyond.size:
        rest = np.abs(high[beyond].astype(np.int64)) - layout.limit
        width = 1 + (int(rest.max()).bit_length() - 1) // 8
        sections.append(_compress(pack_places(beyond)))
        sections += [_compress((rest >> (8 * i)).astype(np.uint8)) for i in range(width)]
    header = _HEADER.pack(_KINDS.index(layout.kind), layout.digits, layout.low_bits, codes.itemsize, width)
    lengths = struct.pack(f"<{len(sections)}I", *map(len, sections))
    return b"".join((header, lengths, *sections, raw))


def decode_frame(frame: bytes | memoryview, count: int, out: Codes | None = None) -> Codes:
    """Decode one frame; the inverse of `encode_frame`.

    Every size is checked against ``count`` before anything of that size is allocated. Returns [count] int8, int16 or
    int32, as encoded; ``out`` itself where codes are int8 and it is given.

    Args:
        frame: the bytes of one frame.
        count: number of codes it must hold.
        out: [count] int8, where int8 codes are written to.

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
    if layout.low_bits:
        join_low(high, raw, layout.low_bits)
    return high


class _Sections:
    """The compressed sections of a frame, one after the other."""

    def __init__(self, parts: list[memoryview]) -> None:
        self._parts = iter(parts)
        self.left = len(parts)

    def take(self, size: int, *, exactly: bool = True) -> Bytes:
        """The next one: ``size`` bytes, or at most ``size`` where not exactly."""
        section = next(self._parts)
        self.left -= 1
        try:
            declared = zstandard.frame_content_size(section)
            if not (declared == size or (not exactly and 0 <= declared < size)):
                wanted = f"{size} belong" if exactly else f"at most {size} belong"
                raise LimitError(
                    f"spectral frame: a section declares {declared} bytes where {wanted}; expected only sizes that fit."
                    " The data is damaged or hostile: do not use it."
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
        unpack(packed, layout.base, layout.digits, digits)
        negative = -(digits & 1).view(np.int8)
        digits >>= 1
        digits += 1
        values = whole
        values ^= negative  # two's complement, without branches
        values -= negative
    else:
        unpack(packed, layout.base, layout.digits, digits, less=layout.limit)
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
    kind, digits, low_bits, itemsize, width = _HEADER.unpack_from(view)
    if kind >= len(_KINDS) or digits not in _BASES[_KINDS[kind]] or itemsize not in (1, 2, 4):
        raise CheckpointError(
            f"spectral frame: unknown layout {kind}/{digits}/{itemsize}; written by another version, or damaged. Update"
            " spectral_surgery, or fetch the file again."
        )
    layout = Layout(_KINDS[kind], digits, low_bits)
    if width > itemsize or low_bits >= 8 * itemsize or (low_bits > 0) != (layout.kind == "split"):
        raise CheckpointError(f"spectral frame: impossible layout {kind}/{low_bits}/{width}; {damaged}")
    sections = (2 if layout.is_sparse else 1) + (1 + width if width else 0)
    start = _HEADER.size + 4 * sections
    raw = low_size(count, low_bits)
    if len(view) < start:
        raise CheckpointError(f"spectral frame: {len(view)} bytes are too few for a header; {damaged}")
    lengths = struct.unpack_from(f"<{sections}I", view, _HEADER.size)
    if start + sum(lengths) + raw != len(view):
        raise CheckpointError(f"spectral frame: sections do not add up to its {len(view)} bytes; {damaged}")
    parts: list[memoryview] = []
    for length in lengths:
        parts.append(view[start : start + length])
        start += length
    return layout, itemsize, parts, view[start:]


def _compress(data: Bytes) -> bytes:
    return zstandard.ZstdCompressor(compression_params=_ZSTD).compress(data.tobytes())
