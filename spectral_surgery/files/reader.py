"""Bytes and tensors of a checkpoint, any range of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from spectral_surgery.codec.hugepages import empty
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import Decoder, TensorInfo, named
from spectral_surgery.files.storage import PIECE, File, pieces_of, read_into

# Codes whose elements torch can address; F4 and F6 pack several into a byte and are only copied.
_TORCH_NAMES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2"}
_TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
_TORCH_NAMES |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
_TORCH_NAMES |= {"I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16"}
_TORCH_NAMES |= {"I32": "int32", "U32": "uint32", "F32": "float32"}
_TORCH_NAMES |= {"C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64"}

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {code: getattr(torch, name) for code, name in _TORCH_NAMES.items() if hasattr(torch, name)}
)
_TOGETHER = 1 << 22  # bytes of small tensors that are read at a time
_AT_ONCE = 1 << 22  # elements that are made at a time of what is stored in their place
CODES: Mapping[torch.dtype, str] = MappingProxyType({dtype: code for code, dtype in DTYPES.items()})


def read_bytes(info: TensorInfo, start: int, stop: int) -> bytearray:
    """Read a range of the stored bytes of a tensor.

    Returns:
        Exactly ``stop - start`` bytes.

    Raises:
        CheckpointError: when the range is not inside the tensor, or the file has shrunk since it
            was indexed.
    """
    _check_range(info, start, stop)
    if info.decoder is not None:
        return _made_bytes(info, start, stop)
    buffer = bytearray(stop - start)
    read_into(info.file, memoryview(buffer), info.start + start)
    return buffer


def read_together(infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, memoryview]]:
    """Small stored tensors and their bytes, in the order of files: those that lie side by side by one read.

    Raises CheckpointError when a file cannot be read.
    """
    run: list[TensorInfo] = []
    for info in sorted(infos, key=lambda info: (str(info.file), info.start)):
        near = run and info.file == run[-1].file and info.start == _end(run[-1])
        if run and not (near and _end(info) <= run[0].start + _TOGETHER):
            yield from _read_run(run)
            run = []
        run.append(info)
    yield from _read_run(run)


def _end(info: TensorInfo) -> int:
    return info.start + info.nbytes


def _read_run(run: list[TensorInfo]) -> Iterator[tuple[TensorInfo, memoryview]]:
    if run:
        start = run[0].start
        data = memoryview(bytearray(_end(run[-1]) - start))
        read_into(run[0].file, data, start)
        yield from ((info, data[info.start - start : _end(info) - start]) for info in run)


def _check_range(info: TensorInfo, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= info.nbytes:
        raise CheckpointError(
            f"{info.file}: bytes {start} to {stop} of {named([info.name])} asked for;"
            f" expected 0 to {info.nbytes}. Check the range."
        )


def release(file: File) -> None:
    """Give the memory back that Linux keeps a local file in, once nobody reads it again.

    What is written next takes that memory: to get other memory from the system takes longer than to fill it.
    """
    if isinstance(file, Path) and hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_flat(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Read a range of the elements of a tensor, in storage order.

    Returns:
        ``[stop - start]`` in the stored dtype, in fresh memory.

    Raises:
        CheckpointError: when the range is not inside the tensor, the file is too short, or torch
            has no such dtype.
    """
    dtype = _dtype(info)
    _check_range(info, start * dtype.itemsize, stop * dtype.itemsize)
    if info.decoder is not None:
        return _made(info, info.decoder, start, stop)
    made = empty((stop - start,), dtype)
    read_into(info.file, made.view(torch.uint8).numpy().data, info.start + start * dtype.itemsize)
    return made


def _dtype(info: TensorInfo) -> torch.dtype:
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{info.file}: {named([info.name])} is {info.dtype}, several elements to a byte;"
            f" expected {', '.join(DTYPES)}. Exclude it, so that it is copied."
        )
    return dtype


def _made(info: TensorInfo, decoder: Decoder, start: int, stop: int) -> Tensor:
    """A range of the elements of a tensor that is made of something else, a few rows at a time."""
    made = empty((stop - start,), DTYPES[info.dtype])
    columns = max(info.shape[-1] if info.shape else 1, 1)
    height = max(1, _AT_ONCE // columns)
    for first in range(start // columns, -(-stop // columns), height):
        last = min(first + height, -(-stop // columns))
        begin, end = max(start, first * columns), min(stop, last * columns)
        rows = decoder.rows(first, last).reshape(-1)
        made[begin - start : end - start] = rows[begin - first * columns : end - first * columns]
    return made


def _made_bytes(info: TensorInfo, start: int, stop: int) -> bytearray:
    size = DTYPES[info.dtype].itemsize
    first = start // size
    made = read_flat(info, first, -(-stop // size)).view(torch.uint8)
    return bytearray(made[start - first * size : stop - first * size].numpy().data)


def byte_pieces(info: TensorInfo) -> Iterator[memoryview]:
    """The stored bytes of a tensor, `storage.PIECE` at a time."""
    if info.decoder is None:
        return pieces_of(info.file, info.start, info.start + info.nbytes)
    starts = range(0, info.nbytes, PIECE)
    return (memoryview(read_bytes(info, start, min(start + PIECE, info.nbytes))) for start in starts)


def flat_pieces(info: TensorInfo) -> Iterator[Tensor]:
    """The elements of a tensor in storage order, `storage.PIECE` bytes of them at a time."""
    dtype = _dtype(info)
    return (torch.frombuffer(piece, dtype=dtype) for piece in byte_pieces(info))


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two stored tensors have the same dtype, shape and bits."""
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    pieces = (map(bytes, byte_pieces(info)) for info in (a, b))  # Python compares views element by element
    return alike and all(one == other for one, other in zip(*pieces, strict=True))


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor.

    Returns:
        The tensor, of shape ``info.shape``, in the stored dtype, in fresh memory.

    Raises:
        CheckpointError: when the file is too short, or torch has no such dtype.
    """
    return read_flat(info, 0, info.numel).reshape(info.shape)
