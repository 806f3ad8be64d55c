"""Safetensors files, written as a stream.

Sizes follow from dtypes and shapes, so a header is written before the first tensor exists, and no
more than one chunk of one tensor is in memory. Equal entries give equal bytes, the same bytes as
the reference writer.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError, ConfigError, LimitError
from spectral_surgery.files.atomic import replace_file, sync, write_pieces, writing_to
from spectral_surgery.files.header import DTYPE_BITS, HEADER_LIMIT, METADATA_KEY, TensorInfo, named
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.reader import CODES, byte_pieces
from spectral_surgery.progress import Progress

PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})  # loaders ask for it
MAX_SHARD_SIZE = 5 * 10**9  # bytes
_AT_ONCE = 64 << 20  # bytes to write before the disk is waited for, where somebody waits
_NAME_KEY = "weights_name"  # in the header of a compressed checkpoint: what its source's files were called
_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
_PLAIN_NAME = re.compile(r"\w[\w.-]*")
_MODEL = "model"
_RANK: Mapping[str, int] = MappingProxyType({code: rank for rank, code in enumerate(DTYPE_BITS)})


@dataclass(frozen=True)
class Entry:
    """One tensor to write.

    Attributes:
        dtype: safetensors code, a key of DTYPE_BITS.
        chunks: called once, when its turn comes; gives its bytes in order, in pieces of any size.
        stored: called when these bytes are on the disk; None where nobody waits for that.

    Raises:
        CheckpointError: when dtype and shape do not make whole bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | bytearray | memoryview]]
    stored: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        """Refuse what no file can hold."""
        bits = math.prod(self.shape) * DTYPE_BITS.get(self.dtype, 1)
        if self.dtype not in DTYPE_BITS or bits % 8 or any(size < 0 for size in self.shape):
            raise CheckpointError(
                f"{self.name}: {self.dtype} of shape {named([self.shape])} cannot be stored; expected whole"
                f" bytes of {', '.join(DTYPE_BITS)}. Cast or reshape it."
            )

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor as bytes, in row-major order; shares memory where it can.

    Returns A flat view of unsigned bytes.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that is in memory.

    Returns:
        The entry, which keeps the tensor alive.

    Raises:
        CheckpointError: when safetensors has no such dtype.
    """
    code = CODES.get(tensor.dtype)
    if code is None:
        raise CheckpointError(
            f"{name}: {tensor.dtype} cannot be stored; expected {', '.join(map(str, CODES))}. Cast it."
        )
    return Entry(name, code, tuple(tensor.shape), lambda: [tensor_bytes(tensor)])


def copy_entry(info: TensorInfo, name: str | None = None) -> Entry:
    """A stored tensor, bit for bit."""
    return Entry(name or info.name, info.dtype, info.shape, lambda: byte_pieces(info))


def write_file(path: Path, entries: Sequence[Entry], *, metadata: Mapping[str, str] = PT_METADATA) -> None:
    """Write one safetensors file: header, then every tensor; widest dtype first, then by name.

    Over a file that begins with the same header it writes in place, so that entries may come from there.

    Raises:
        CheckpointError: when a name repeats, chunks disagree with a declared size, or the file
            cannot be written.
        LimitError: when the header would be too long to be read again.
    """
    _check_names(path, entries)
    ordered = sorted(entries, key=lambda entry: (-_RANK[entry.dtype], entry.name))
    header = _header(path, ordered, metadata)
    with writing_to(path), path.open("r+b" if _begins_with(path, header) else "wb") as file:
        if any(entry.stored for entry in ordered):  # its header has to be read, should it remain unfinished
            file.truncate(len(header) + sum(entry.nbytes for entry in ordered))
        file.write(header)
        waiting = _Waiting(file, path.parent)
        for entry in ordered:
            _stream(file, path, entry)
            waiting.add(entry)
        waiting.sync()


def _begins_with(path: Path, header: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


@dataclass
class _Waiting:
    """Entries that are written, and wait to be on the disk."""

    file: BinaryIO
    folder: Path
    calls: list[Callable[[], None]] = field(default_factory=list)
    nbytes: int = 0

    def add(self, entry: Entry) -> None:
        self.nbytes += entry.nbytes
        if entry.stored is not None:
            self.calls.append(entry.stored)
        if self.calls and self.nbytes >= _AT_ONCE:
            self.sync()

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.calls:
            sync(self.folder)
        for call in self.calls:
            call()
        self.calls, self.nbytes = [], 0


def write_checkpoint(
    folder: Path,
    entries: Sequence[Entry],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] = PT_METADATA,
    name: str = _MODEL,
) -> list[Path]:
    """Write a checkpoint into a folder, by default under the names that transformers looks for.

    Args:
        folder: an existing folder; see `publishing`.
        entries: the tensors. They fill shards in this order, as in huggingface_hub.
        max_shard_size: bytes of tensors in a file; a larger tensor gets a separate file.
        metadata: free text by key, in every file.
        name: of the files, before number and ending; see `weights_name`.

    Raises:
        CheckpointError: when a name repeats, chunks disagree with a declared size, or a file cannot
            be written.
        ConfigError: when max_shard_size is not positive.
        LimitError: when a header would be too long to be read again.
    """
    _check_names(folder, entries)
    shards = _shards(entries, max_shard_size)
    files = shard_names(name, len(shards))
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, metadata=metadata)
    if len(shards) > 1:
        weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        write_index(folder, name, weight_map, sum(entry.nbytes for entry in entries))
    with writing_to(folder):
        sync(folder)
    return [folder / file for file in files]


def shard_names(name: str, count: int) -> list[str]:
    """What the weight files of a checkpoint are called."""
    if count == 1:
        return [f"{name}.safetensors"]
    return [f"{name}-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def write_index(folder: Path, name: str, weight_map: Mapping[str, str], total: int) -> None:
    """Write which file each tensor is in, and how many bytes all of them have."""
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    replace_file(folder / f"{name}.safetensors.index.json", text.encode())


def weights_name(index: CheckpointIndex) -> str:
    """What the weight files of a checkpoint are called, before number and ending, so that its tools find them again.

    Returns ``model`` for a model of transformers, and where files have several names; else as it is, such as
    ``diffusion_pytorch_model`` for a part of a diffusers pipeline.
    """
    names = {_NUMBER.sub("", file.name.removesuffix(".safetensors")) for file in index.files}
    name = index.metadata.get(_NAME_KEY, names.pop() if len(names) == 1 else _MODEL)
    return name if "model_type" not in index.config and _PLAIN_NAME.fullmatch(name) else _MODEL


def weights_metadata(index: CheckpointIndex) -> dict[str, str]:
    """Metadata for a checkpoint made from another one, under usual file names, that keeps the unusual ones."""
    name = weights_name(index)
    return {**PT_METADATA, **({_NAME_KEY: name} if name != _MODEL else {})}


def _check_names(where: Path, entries: Sequence[Entry]) -> None:
    counts = Counter(entry.name for entry in entries)
    bad = [name for name, count in counts.items() if count > 1 or name == METADATA_KEY]
    if bad:
        raise CheckpointError(
            f"{where}: names {named(bad)} repeat or are reserved; expected different names other than"
            f" {METADATA_KEY}. Rename the tensors."
        )


def _shards(entries: Sequence[Entry], max_shard_size: int) -> list[list[Entry]]:
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size: {max_shard_size} is not a size; expected 1 or more.")
    shards: list[list[Entry]] = []
    current: list[Entry] = []
    room = max_shard_size
    for entry in entries:
        if entry.nbytes > max_shard_size:
            shards.append([entry])
            continue
        if entry.nbytes > room:
            shards.append(current)
            current, room = [], max_shard_size
        current.append(entry)
        room -= entry.nbytes
    return [*shards, current] if current or not shards else shards


def _header(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        offsets = [start, end]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: a name is not text ({error}); expected valid Unicode. Rename the tensor."
        ) from None
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8
    if len(raw) > HEADER_LIMIT:
        raise LimitError(
            f"{path}: the header would be {len(raw)} bytes; expected at most {HEADER_LIMIT}. Write smaller shards."
        )
    return len(raw).to_bytes(8, "little") + raw


def _stream(file: BinaryIO, path: Path, entry: Entry) -> None:
    written = 0
    for chunk in entry.chunks():
        written += memoryview(chunk).nbytes
        if written > entry.nbytes:
            break
        write_pieces(file, chunk)
    if written != entry.nbytes:
        raise CheckpointError(
            f"{path}: expected {entry.nbytes} bytes of {named([entry.name])}, {entry.dtype} {named([entry.shape])}, got"
            f" {written}. The producer of its chunks is wrong."
        )


def reported(entries: Sequence[Entry], progress: Progress) -> list[Entry]:
    """The same entries; progress is called when one is written.

    ``progress``: called with the number written, the number of all, and the name.
    """
    written = count(1)

    def entry(old: Entry) -> Entry:
        def chunks() -> Iterator[bytes | bytearray | memoryview]:
            yield from old.chunks()
            progress(next(written), len(entries), old.name)

        return replace(old, chunks=chunks)

    return [entry(old) for old in entries]
