"""PyTorch's files, ``pytorch_model.bin``, for those who trust who made them.

torch reads names, shapes and places from the pickle, and with ``weights_only`` nothing that could run code. The numbers
lie uncompressed in the same file, so that any range of a tensor is read as from safetensors, without the others.
"""

from __future__ import annotations

import pickle  # the name of an error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import TensorInfo, named, read_json
from spectral_surgery.files.reader import CODES, read_flat
from spectral_surgery.files.storage import FoundCheckpoint, reading

__all__ = ["PICKLED_ENDINGS", "PICKLED_NAME", "find_pickled", "holds_pickled"]

PICKLED_NAME, PICKLED_ENDINGS = "pytorch_model", (".bin", ".pt", ".pth")
_SINGLE, _INDEX = f"{PICKLED_NAME}.bin", f"{PICKLED_NAME}.bin.index.json"
_DAMAGED = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError, IndexError)


@dataclass(frozen=True)
class _Strided:
    """A tensor whose numbers are stored in another order.

    Attributes:
        storage: [N], from the first number of the tensor to the last.
        stride: of the tensor, in elements.
    """

    storage: TensorInfo
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        return self.storage.nbytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows; all of the tensor is read for them."""
        made = read_flat(self.storage, 0, self.storage.numel).as_strided(self.shape, self.stride)
        return made.reshape(-1, self.shape[-1])[start:stop]


def holds_pickled(source: Path) -> bool:
    """Whether a path leads to PyTorch's files, and to no safetensors beside them."""
    if source.is_file():
        return source.suffix in PICKLED_ENDINGS
    return not any(source.glob("*.safetensors")) and any((source / name).is_file() for name in (_SINGLE, _INDEX))


def find_pickled(source: Path) -> FoundCheckpoint:
    """Find the tensors of a checkpoint in PyTorch's files. To call it is to trust who made them.

    Args:
        source: a folder with ``pytorch_model.bin``, or shards and their index; or one such file.

    Raises:
        CheckpointError: when there are none, or they hold anything else than tensors by name, or in another format
            than that of PyTorch 1.6 and later.
    """
    with reading(source):
        root = source if source.is_dir() else source.parent
        files = [source] if source.is_file() else _files_of(source)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors |= _tensors_of(file)
    return FoundCheckpoint(root, dict(sorted(tensors.items())), tuple(files), str(source))


def _files_of(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        files = [folder / Path(shard).name for shard in shards]
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise CheckpointError(
                f"{folder}: {named(missing)} of the files that {_INDEX} names are missing; expected all. Download them."
            )
        return files
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise CheckpointError(f"{folder}: no {_SINGLE}; expected PyTorch's files. Check the path.")


def _tensors_of(file: Path) -> dict[str, TensorInfo]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # tensors without numbers, which know their place

    try:
        with FakeTensorMode():
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
        raise CheckpointError(
            f"{file}: torch.load(weights_only=True, mmap=True) refuses it ({reason}); expected tensors by name and"
            " nothing else, as torch.save writes. Get the checkpoint in safetensors."
        ) from None
    values = loaded.values() if isinstance(loaded, dict) else [loaded]
    others = sorted({type(value).__name__ for value in values if not isinstance(value, Tensor)})
    if others or not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{file}: holds {named(others)}; expected tensors by name. Save its state_dict() alone.")
    size = file.stat().st_size
    return {name: _info(file, size, name, tensor) for name, tensor in loaded.items()}


def _info(file: Path, size: int, name: str, tensor: Any) -> TensorInfo:
    code, place = CODES.get(tensor.dtype), tensor.untyped_storage()._checkpoint_offset
    if code is None or place is None:
        raise CheckpointError(f"{file}: {named([name])} is {tensor.dtype}; expected {', '.join(map(str, CODES))}.")
    width, shape, stride = tensor.dtype.itemsize, tuple(tensor.shape), tensor.stride()
    count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if tensor.numel() else 0
    start = place + tensor.storage_offset() * width
    if start + count * width > size:
        raise CheckpointError(
            f"{file}: expected all numbers of {named([name])}, got a file that ends before them. Download it again."
        )
    if tensor.is_contiguous():
        return TensorInfo(name, code, shape, file, start, count * width)
    storage = TensorInfo(name, code, (count,), file, start, count * width)
    return TensorInfo(name, code, shape, file, start, tensor.numel() * width, _Strided(storage, shape, stride))
