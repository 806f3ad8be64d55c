"""The header of one safetensors file, believed only after it was checked.

A file is a little-endian u64 header length N, N bytes of JSON
``{name: {dtype, shape, data_offsets}}`` and one block of data. Everything a header claims is
compared with the size of the file before anything is allocated, so that the rest of the package can
trust a `TensorInfo`. Other JSON that comes with a checkpoint is read with the same care.

Source: the safetensors format (https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeGuard

from spectral_surgery.errors import CheckpointError, LimitError
from spectral_surgery.files.storage import File, read_into, reading, size_of

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LIMIT = 100_000_000  # bytes, as in the reference reader
MAX_RANK = 64
_FIRST = 1 << 15  # bytes read at once; most headers end within
METADATA_KEY = "__metadata__"

# Bits of one element. The reference writer stores the last rows of this table first.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8}
    | {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
    | {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
    | {"C64": 64, "F64": 64, "I64": 64, "U64": 64}
)

FLOATS = ("F64", "F32", "F16", "BF16")
FLOATS8 = ("F8_E4M3", "F8_E5M2")  # of which numbers can be computed with, too

_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_AGAIN = "Download or write it again."
_LOOKALIKES: Mapping[bytes, str] = MappingProxyType(
    {
        b"version ": "expected weights, got a Git LFS pointer. Run `git lfs pull`.",
        b"PK\x03\x04": "expected safetensors, got a zip archive, as torch.save writes. Convert it.",
        b"GGUF": "expected safetensors, got a GGUF file. Where GGUF is read, give the file by itself, called .gguf.",
    }
)


class Decoder(Protocol):
    """How a tensor is made of what is stored in its place. Such an object can be pickled, for other processes."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that are stored in its place."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix [numel / I, I], I the last dimension, in the dtype that the tensor is said to have."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    Attributes:
        dtype: safetensors code, a key of DTYPE_BITS.
        start: offset of its first byte from the beginning of the file.
        decoder: makes it of what is stored in its place; None for a tensor that is stored as it is. The other
            attributes are those of what is made, and `file` has most of what it is made of.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: File
    start: int
    nbytes: int
    decoder: Decoder | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in files."""
        return self.nbytes if self.decoder is None else self.decoder.stored_bytes


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Attributes:
        tensors: by name, in header order; together they cover the data of the file exactly once.
        metadata: its free text by key, empty without any.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(file: File) -> Header:
    """Read and check the header of one safetensors file; its data is not looked at.

    Raises:
        CheckpointError: when the header is damaged or disagrees with the size of the file.
        LimitError: when it is longer than HEADER_LIMIT.
    """
    with reading(file):
        size = size_of(file)
        first = _beginning(file, min(size, _FIRST))
        data = 8 + _header_length(file, first[:8], size)
        raw = (first if data <= len(first) else _beginning(file, data))[8:data]
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{file}: expected a safetensors file, got a header that begins with {raw[:8]!r}. {_AGAIN}"
        )
    header = _parse_object(raw, f"{file}: the header")
    metadata = _metadata(file, header.pop(METADATA_KEY, None))
    tensors = {name: _tensor_info(file, name, entry, data, size) for name, entry in header.items()}
    _check_layout(file, tensors.values(), data, size)
    return Header(tensors, metadata)


def _beginning(file: File, size: int) -> bytes:
    """The first bytes; all from the first one on, which a server that knows no ranges can give, too."""
    buffer = bytearray(size)
    read_into(file, memoryview(buffer), 0)
    return bytes(buffer)


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file of bounded size; repeated keys are refused.

    Raises:
        CheckpointError: when it cannot be read or is not a JSON object.
        LimitError: when it is larger than HEADER_LIMIT.
    """
    with reading(path):
        size = size_of(path)
        if size > HEADER_LIMIT:
            raise LimitError(f"{path}: expected at most {HEADER_LIMIT} bytes of JSON, got {size}. {_AGAIN}")
        raw = path.read_bytes()
    return _parse_object(raw, f"{path}: the file")


def named(values: Iterable[object], limit: int = 5) -> str:
    """The first few values for an error text, each shortened, and how many more there are."""
    every = list(values)
    shown = ", ".join(map(_short, every[:limit]))
    return f"{shown} and {len(every) - limit} more" if len(every) > limit else shown


def _short(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxlong = 120
    return short.repr(value)


def _parse_object(raw: bytes, where: str) -> dict[str, object]:
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected JSON, got an error ({error}). {_AGAIN}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: expected JSON of one object, got another value. {_AGAIN}")
    return parsed


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {_short(key)} appears {count} times")
    return entries


def _header_length(file: File, prefix: bytes, size: int) -> int:
    for magic, what in _LOOKALIKES.items():
        if prefix.startswith(magic):
            raise CheckpointError(f"{file}: {what}")
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: expected a safetensors file, of 8 bytes at least, got {size} bytes. {_AGAIN}")
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT:
        raise LimitError(
            f"{file}: expected a safetensors file with a header of at most {HEADER_LIMIT} bytes, got one that claims"
            f" {length}. {_AGAIN}"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{file}: expected a whole file, got {size} bytes where the header alone has {length}. {_AGAIN}"
        )
    return length


def _metadata(file: File, metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{file}: expected text by key as {METADATA_KEY}, got {named([metadata])}. {_AGAIN}")
    return metadata


def _tensor_info(file: File, name: str, entry: object, data: int, size: int) -> TensorInfo:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {named([name])}: {what}. {_AGAIN}")

    if _SURROGATE.search(name):
        raise damaged("expected valid Unicode, got a name with half a surrogate pair")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise damaged(f"expected dtype, shape and data_offsets, got {named([entry])}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(f"expected dtype {', '.join(DTYPE_BITS)}, got {named([dtype])}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK or math.prod(n or 1 for n in shape) >= 2**63:
        raise damaged(f"expected a shape of up to {MAX_RANK} sizes with a product below 2**63, got {named([shape])}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"expected data_offsets with a begin and an end not before it, got {named([offsets])}")
    start, stop = data + offsets[0], data + offsets[1]
    if stop > size:
        raise damaged(f"expected bytes within the {size} of the file, got an end at {stop}; it seems truncated")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (stop - start):
        raise damaged(f"expected {bits / 8:.15g} bytes for {dtype} of shape {named([shape])}, got {stop - start}")
    return TensorInfo(name, dtype, tuple(shape), file, start, stop - start)


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_layout(file: File, tensors: Iterable[TensorInfo], data: int, size: int) -> None:
    end = data
    for info in sorted(tensors, key=lambda info: (info.start, info.nbytes)):
        if info.start != end:
            gap = info.start - end
            what = f"leaves a hole of {gap} bytes after" if gap > 0 else f"overlaps {-gap} bytes of"
            raise CheckpointError(
                f"{file}: expected one tensor after the other, got {named([info.name])}, which {what} the data"
                f" before it. {_AGAIN}"
            )
        end += info.nbytes
    if end != size:
        raise CheckpointError(f"{file}: expected nothing after the last tensor, got {size - end} bytes. {_AGAIN}")
