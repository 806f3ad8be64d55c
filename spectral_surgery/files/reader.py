"""Bytes and tensors of a checkpoint, any range of them.

Files are read and never mapped: mapped pages would count as resident memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from spectral_surgery.codec.hugepages import empty
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import TensorInfo, named, reading

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
PIECE = 1 << 20  # bytes read at a time: what the cache holds
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
    buffer = bytearray(stop - start)
    _fill(memoryview(buffer), info, start)
    return buffer


def _check_range(info: TensorInfo, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= info.nbytes:
        raise CheckpointError(
            f"{info.file}: bytes {start} to {stop} of {named([info.name])} asked for;"
            f" expected 0 to {info.nbytes}. Check the range."
        )


def _fill(view: memoryview, info: TensorInfo, start: int) -> None:
    done = 0
    with reading(info.file), info.file.open("rb", buffering=0) as stream:
        stream.seek(info.start + start)
        while done < view.nbytes:
            count = stream.readinto(view[done:])  # one call reads at most 2 GiB
            if not count:
                raise CheckpointError(
                    f"{info.file}: ends inside {named([info.name])}, {view.nbytes - done} bytes"
                    " short; expected a file that does not change. Download it again."
                )
            done += count


def release(path: Path) -> None:
    """Give the memory back that Linux keeps a file in, once nobody reads it again.

    What is written next takes that memory: to get other memory from the system takes longer than to fill it.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_flat(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Read a range of the elements of a tensor, in storage order.

    Returns:
        ``[stop - start]`` in the stored dtype, with memory of its own.

    Raises:
        CheckpointError: when the range is not inside the tensor, the file is too short, or torch
            has no such dtype.
    """
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{info.file}: {named([info.name])} is {info.dtype}, several elements to a byte;"
            f" expected {', '.join(DTYPES)}. Exclude it, so that it is copied."
        )
    _check_range(info, start * dtype.itemsize, stop * dtype.itemsize)
    made = empty((stop - start,), dtype)
    _fill(made.view(torch.uint8).numpy().data, info, start * dtype.itemsize)
    return made


def byte_pieces(info: TensorInfo) -> Iterator[bytearray]:
    """The stored bytes of a tensor, PIECE at a time."""
    for start in range(0, info.nbytes, PIECE):
        yield read_bytes(info, start, min(start + PIECE, info.nbytes))


def flat_pieces(info: TensorInfo) -> Iterator[Tensor]:
    """The elements of a tensor in storage order, PIECE of them at a time."""
    for start in range(0, info.numel, PIECE):
        yield read_flat(info, start, min(start + PIECE, info.numel))


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two stored tensors have the same dtype, shape and bits."""
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    return alike and all(one == other for one, other in zip(byte_pieces(a), byte_pieces(b), strict=True))


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor.

    Returns:
        The tensor, of shape ``info.shape``, in the stored dtype, with memory of its own.

    Raises:
        CheckpointError: when the file is too short, or torch has no such dtype.
    """
    return read_flat(info, 0, info.numel).reshape(info.shape)
