"""The tensors that a checkpoint stands for, plain or compressed, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.files.compressed.lossless import decoded_entry
from spectral_surgery.files.compressed.manifest import SUFFIXES, TensorRecord
from spectral_surgery.files.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.files.reader import DTYPES, read_flat
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.files.writer import Entry, tensor_bytes

ROWS_BYTES = 1 << 22  # of stored rows that are read at a time


@dataclass(frozen=True)
class DenseTensor:
    """A tensor as the plain checkpoint has it.

    Attributes:
        dtype: safetensors code.
        stored: the name that it is stored under: another one for the second of two that are tied.
        record: of its spectrum; None for a tensor that is stored as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: str
    record: TensorRecord | None = None


@dataclass(frozen=True)
class DenseCheckpoint:
    """A checkpoint, plain or compressed.

    Attributes:
        checkpoint: the compressed one; None for a plain one.
        threads: frames decoded at once.
    """

    index: CheckpointIndex
    checkpoint: CompressedCheckpoint | None
    threads: int = 1

    @cached_property
    def tensors(self) -> dict[str, DenseTensor]:
        """All tensors by name, sorted."""
        records = self.checkpoint.manifest.tensors if self.checkpoint else {}
        aliases = self.checkpoint.manifest.aliases if self.checkpoint else {}
        parts = {f"{name}.{suffix}" for name in records for suffix in SUFFIXES}
        tensors = {name: DenseTensor(name, one.dtype, one.shape, name, one) for name, one in records.items()}
        tensors |= {
            name: DenseTensor(name, info.dtype, info.shape, name)
            for name, info in self.index.tensors.items()
            if name not in parts
        }
        tensors |= {alias: replace(tensors[name], name=alias) for alias, name in aliases.items()}
        return dict(sorted(tensors.items()))

    @cached_property
    def headers(self) -> CheckpointIndex:
        """The index of the plain checkpoint, to ask for names and shapes; nothing can be read by it."""
        nowhere = self.index.files[0]
        tensors = {name: TensorInfo(name, one.dtype, one.shape, nowhere, 0, 0) for name, one in self.tensors.items()}
        return replace(self.index, tensors=tensors)

    def config(self) -> Mapping[str, object]:
        """The configuration of the plain checkpoint."""
        return {key: value for key, value in self.index.config.items() if key != "quantization_config"}

    def rows(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor in order, [N, I] with its last dimension as columns; float32 where it was compressed."""
        tensor = self.tensors[name]
        columns = tensor.shape[-1] if tensor.shape else 1
        if tensor.record is None or self.checkpoint is None:
            yield from self._stored_rows(self.index.tensors[tensor.stored], columns)
            return
        for number in range(len(tensor.record.parts)):
            part = self.checkpoint.part(tensor.stored, number).to_dense(threads=self.threads)
            yield part.reshape(-1, columns)

    def entry(self, name: str) -> Entry:
        """A tensor for the writer, bit for bit, or decoded and cast once."""
        tensor = self.tensors[name]
        if tensor.record is None:
            return decoded_entry(self.index.tensors[tensor.stored], name)
        dtype = DTYPES[tensor.dtype]
        return Entry(name, tensor.dtype, tensor.shape, lambda: (tensor_bytes(cast(r, dtype)) for r in self.rows(name)))

    @staticmethod
    def _stored_rows(info: TensorInfo, columns: int) -> Iterator[Tensor]:
        step = max(1, ROWS_BYTES // max(1, columns * 4)) * columns
        for start in range(0, math.prod(info.shape), step):
            yield read_flat(info, start, min(start + step, info.numel)).reshape(-1, columns)


def cast(dense: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in another dtype; float8 has no infinity to round to, and large values would become NaN: they are cut."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        dense = dense.clamp(-limit, limit)
    return dense.to(dtype)


def open_dense(source: Checkpoint, *, threads: int = 1) -> DenseCheckpoint:
    """Open a checkpoint, plain or compressed; reads headers.

    Raises CheckpointError when it is damaged, holds differences, or is quantised in another way.
    """
    if is_compressed(source):
        checkpoint = open_compressed(source)
        return DenseCheckpoint(checkpoint.index, checkpoint, threads)
    index = read_index(source)
    index.require_plain()
    return DenseCheckpoint(index, None, threads)
