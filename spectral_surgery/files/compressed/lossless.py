"""Tensors of a compressed checkpoint that are coded without loss: stored, checked, and read as if they were plain.

A tensor is cut into frames (`codec.byte_planes`), whose planes are stored one after the other: those of the first
frame, those of the second one, and so on. Parts are ranges of frames that were encoded separately.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.codec.byte_planes import (
    Centres,
    Layout,
    centres_of,
    decode_planes,
    encode_planes,
    layout_of,
    split,
)
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.codec.parallel import parallel_map
from spectral_surgery.errors import CheckpointError, LimitError
from spectral_surgery.files.header import DTYPE_BITS, FLOATS, FLOATS8, TensorInfo
from spectral_surgery.files.reader import DTYPES, read_bytes, read_tensor
from spectral_surgery.files.writer import Entry, copy_entry, tensor_bytes

LOSSLESS_SUFFIXES = ("lossless_codes", "lossless_frames")
LEAST_BYTES = 4096  # of a tensor: what smaller ones could save, names and headers take
TURNED = (*FLOATS, *FLOATS8, "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # a sign, and then an exponent
_MOST = 1 << 46  # numbers of a tensor
PART_FRAMES = 16  # frames of a part


@dataclass(frozen=True)
class LosslessPart:
    """Frames that were encoded separately.

    Attributes:
        numbers: the first number and the end of the range.
        centres: of each plane, most significant first; None for one that is stored as it is.
        crc32: of all pieces of each frame.
    """

    numbers: tuple[int, int]
    centres: Centres
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class LosslessRecord:
    """A tensor that is coded without loss.

    Attributes:
        dtype: safetensors code.
        columns: of the matrices that planes are seen as.
        per_frame: numbers of a frame.
    """

    dtype: str
    shape: tuple[int, ...]
    columns: int
    per_frame: int
    parts: tuple[LosslessPart, ...]

    @property
    def layout(self) -> Layout:
        """How numbers are cut into frames."""
        return Layout(DTYPE_BITS[self.dtype] // 8, self.dtype in TURNED, self.columns, self.per_frame)

    @property
    def numel(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    @property
    def frames(self) -> int:
        """Number of frames."""
        return -(-self.numel // self.per_frame)


def is_codable(info: TensorInfo) -> bool:
    """Whether a tensor is worth an attempt."""
    return info.dtype in DTYPES and info.dtype != "C64" and info.nbytes >= LEAST_BYTES


def layout_for(info: TensorInfo) -> Layout:
    """How the numbers of a tensor are cut into frames."""
    return layout_of(DTYPE_BITS[info.dtype] // 8, info.numel, turned=info.dtype in TURNED)


def parts_for(info: TensorInfo) -> tuple[tuple[int, int], ...]:
    """Ranges of numbers that are encoded one by one."""
    step = PART_FRAMES * layout_for(info).per_frame
    return tuple((start, min(start + step, info.numel)) for start in range(0, info.numel, step))


def encode_part(
    flat: Tensor, layout: Layout, numbers: tuple[int, int], threads: int
) -> tuple[list[bytes], LosslessPart]:
    """Encode a range of the numbers of a tensor.

    Returns the pieces of all frames, and what to write down about them.

    Args:
        flat: [n], the numbers.
        numbers: where they begin and end in it.
    """
    data = _unsigned(flat)
    frames = [data[start : start + layout.per_frame] for start in range(0, len(data), layout.per_frame)]
    centres = centres_of(split(data, layout.turned))
    coded = parallel_map(lambda frame: encode_planes(frame, layout, centres), frames, threads)
    sums = tuple(crc32_of(pieces) for pieces in coded)
    return [piece for pieces in coded for piece in pieces], LosslessPart(numbers, centres, sums)


def parse_lossless(name: str, body: Mapping[str, Any]) -> LosslessRecord:
    """Check the parsed JSON of a record. Raises LimitError when its sizes are impossible."""
    parts = tuple(map(parse_lossless_part, body["parts"]))
    dtype, columns, per_frame = str(body["dtype"]), int(body["columns"]), int(body["per_frame"])
    record = LosslessRecord(dtype, tuple(map(int, body["shape"])), columns, per_frame, parts)
    ends = [0, *(part.numbers[1] for part in parts)]
    fits = (
        dtype in DTYPES
        and all(size >= 0 for size in record.shape)
        and 0 < record.numel <= _MOST
        and 0 < columns <= per_frame <= 1 << 24
        and per_frame % columns == 0
        and ends[-1] == record.numel
        and all(
            part.numbers == (start, stop) and start < stop
            for part, (start, stop) in zip(parts, pairwise(ends), strict=True)
        )
        and all(start % per_frame == 0 for start in ends[:-1])
        and all(_fits(part, record) for part in parts)
    )
    if not fits:
        raise LimitError(
            f"{name}: its lossless parts do not fit {dtype} {record.shape}; expected those compress wrote."
        )
    return record


def parse_lossless_part(body: Mapping[str, Any]) -> LosslessPart:
    """Read the parsed JSON of a part."""
    start, stop = map(int, body["numbers"])
    centres = tuple(None if centre is None else int(centre) for centre in body["centres"])
    return LosslessPart((start, stop), centres, tuple(map(int, body["crc32"])))


def _fits(part: LosslessPart, record: LosslessRecord) -> bool:
    frames = -(-(part.numbers[1] - part.numbers[0]) // record.per_frame)
    centres = all(centre is None or 0 <= centre < 256 for centre in part.centres)
    return len(part.crc32) == frames and len(part.centres) == DTYPE_BITS[record.dtype] // 8 and centres


@dataclass(frozen=True)
class LosslessTensor:
    """The decoder of a tensor, see `header.Decoder`.

    Attributes:
        codes: where all pieces are, one after the other.
        frames: where each piece begins.
    """

    name: str
    record: LosslessRecord
    codes: TensorInfo
    frames: TensorInfo = field(repr=False)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are stored in its place."""
        return self.codes.nbytes + self.frames.nbytes

    @cached_property
    def _offsets(self) -> list[int]:
        return checked_offsets(self.name, read_tensor(self.frames), self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix [numel / I, I], I the last dimension, in the dtype of the tensor.

        Raises CheckpointError when what is stored does not have its checksum.
        """
        columns = self.record.shape[-1] if self.record.shape else 1
        return self.numbers(start * columns, stop * columns).reshape(-1, columns)

    def numbers(self, start: int, stop: int) -> Tensor:
        """A range of its numbers, in storage order: [stop - start]."""
        per, last = self.record.per_frame, self.record.numel
        frames = range(start // per, -(-stop // per)) if stop > start else range(0)
        first = frames.start * per
        made = empty((min(frames.stop * per, last) - first if frames else 0,), DTYPES[self.record.dtype])
        flat = _unsigned(made)
        parallel_map(
            lambda frame: self._frame(frame, flat[frame * per - first : (frame + 1) * per - first]),
            frames,
            torch.get_num_threads(),
        )
        return made[start - first : stop - first] if frames else made

    def pieces(self) -> Iterator[Tensor]:
        """All numbers in storage order, some frames at a time."""
        step = PART_FRAMES * self.record.per_frame
        for start in range(0, self.record.numel, step):
            yield self.numbers(start, min(start + step, self.record.numel))

    def _frame(self, number: int, out: Any) -> None:
        record, per = self.record, self.record.per_frame
        start = number * per
        part = next(part for part in record.parts if part.numbers[0] <= start < part.numbers[1])
        planes = len(part.centres)
        ends = self._offsets[number * planes : (number + 1) * planes + 1]
        data = memoryview(read_bytes(self.codes, ends[0], ends[-1]))
        if zlib.crc32(data) != part.crc32[(start - part.numbers[0]) // per]:
            raise CheckpointError(
                f"{self.name}: expected frame {number} with its checksum, got another one. Fetch"
                f" {self.codes.file.name} again."
            )
        pieces = [data[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)]
        decode_planes(pieces, record.layout, part.centres, len(out), out)


def checked_offsets(name: str, offsets: Tensor, codes: TensorInfo) -> list[int]:
    """Where frames begin and end. Raises LimitError when that is not in their codes, one after the other."""
    places: list[int] = offsets.tolist()
    if places[0] != 0 or places[-1] != codes.nbytes or any(a > b for a, b in pairwise(places)):
        raise LimitError(
            f"{name}: expected offsets in {codes.nbytes} bytes of codes, got others. Fetch {codes.file.name} again."
        )
    return places


def lossless_info(name: str, record: LosslessRecord, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """A tensor as if it were stored plainly. Raises CheckpointError when what the record says is not there."""
    codes, frames = (tensors.get(f"{name}.{suffix}") for suffix in LOSSLESS_SUFFIXES)
    pieces = record.frames * (DTYPE_BITS[record.dtype] // 8) + 1
    if codes is None or frames is None or codes.dtype != "U8" or (frames.dtype, frames.shape) != ("I64", (pieces,)):
        raise CheckpointError(
            f"{name}: expected codes as the manifest says, got none, or others; both must come from one run. Fetch"
            " both again."
        )
    nbytes = record.numel * DTYPE_BITS[record.dtype] // 8
    decoder = LosslessTensor(name, record, codes, frames)
    return TensorInfo(name, record.dtype, record.shape, codes.file, codes.start, nbytes, decoder)


def decoded_entry(info: TensorInfo, name: str) -> Entry:
    """A stored tensor for the writer, bit for bit; of one that is coded without loss, every frame is decoded once."""
    decoder = info.decoder
    if not isinstance(decoder, LosslessTensor):
        return copy_entry(info, name)
    return Entry(name, info.dtype, info.shape, lambda: map(tensor_bytes, decoder.pieces()))


def raw_entries(info: TensorInfo) -> list[Entry]:
    """A stored tensor for the writer in the very form that it is stored in."""
    decoder = info.decoder
    return [
        copy_entry(raw) for raw in ((decoder.codes, decoder.frames) if isinstance(decoder, LosslessTensor) else (info,))
    ]


def _unsigned(flat: Tensor) -> Any:
    """Numbers as unsigned integers of their size, bit for bit."""
    return flat.view(torch.uint8).numpy().view(f"u{flat.element_size()}")


def crc32_of(pieces: Iterable[bytes | bytearray | memoryview]) -> int:
    """The checksum of pieces that follow each other."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc
