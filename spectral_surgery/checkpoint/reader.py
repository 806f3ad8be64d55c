"""Bytes and tensors of a checkpoint, any range of them.

Files are read and never mapped: mapped pages would count as resident memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spectral_surgery.checkpoint.header import TensorInfo, named, reading
from spectral_surgery.errors import CheckpointError

# Codes whose elements torch can address. F4 and F6 pack several into a byte: they are only copied.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "C64": torch.complex64,
        "F64": torch.float64,
        "I64": torch.int64,
        "U64": torch.uint64,
    }
)
CODES: Mapping[torch.dtype, str] = MappingProxyType({dtype: code for code, dtype in DTYPES.items()})


def read_bytes(info: TensorInfo, start: int, stop: int) -> bytearray:
    """Read a range of the stored bytes of a tensor.

    Args:
        info: the tensor.
        start: first byte, counted from the beginning of the tensor.
        stop: end of the range.

    Returns:
        Exactly ``stop - start`` bytes.

    Raises:
        CheckpointError: when the range is not inside the tensor, or the file has shrunk since it
            was indexed.
    """
    if not 0 <= start <= stop <= info.nbytes:
        raise CheckpointError(
            f"{info.file}: bytes {start} to {stop} of {named([info.name])} asked for;"
            f" 0 to {info.nbytes} are accepted. Check the range."
        )
    buffer = bytearray(stop - start)
    view, done = memoryview(buffer), 0
    with reading(info.file), info.file.open("rb", buffering=0) as stream:
        stream.seek(info.start + start)
        while done < len(buffer):
            count = stream.readinto(view[done:])  # one call reads at most 2 GiB
            if not count:
                raise CheckpointError(
                    f"{info.file}: ends inside {named([info.name])}, {len(buffer) - done} bytes"
                    " short; a file that does not change is accepted. Download it again."
                )
            done += count
    return buffer


def read_flat(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Read a range of the elements of a tensor, in storage order.

    Args:
        info: the tensor.
        start: first element.
        stop: end of the range.

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
            f" {', '.join(DTYPES)} are accepted. Exclude it, so that it is copied."
        )
    data = read_bytes(info, start * dtype.itemsize, stop * dtype.itemsize)
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a tensor.

    Args:
        info: the tensor.

    Returns:
        The tensor, of shape ``info.shape``, in the stored dtype, with memory of its own.

    Raises:
        CheckpointError: when the file is too short, or torch has no such dtype.
    """
    return read_flat(info, 0, info.numel).reshape(info.shape)
