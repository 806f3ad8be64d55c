"""Rows of tensors in a GGUF file, in the order in which a model of transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError, required
from spectral_surgery.files.header import TensorInfo, named
from spectral_surgery.files.reader import read_flat

Indices = npt.NDArray[np.int64]
PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # of GGUF, and what safetensors calls them


@dataclass(frozen=True)
class Block:
    """A tensor as it is stored.

    Attributes:
        rows: U8 [R, bytes of a row].
        kind: what GGUF calls its numbers, such as Q4_K.
    """

    rows: TensorInfo
    kind: str

    def read(self, start: int, stop: int) -> Tensor:
        """Rows as numbers: [stop - start, I] float32."""
        gguf = library()
        width = self.rows.shape[1]
        stored = read_flat(self.rows, start * width, stop * width).numpy().reshape(stop - start, width)
        values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[self.kind])
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))


@dataclass(frozen=True)
class GgufRows:
    """A parameter that is made of rows of stored tensors.

    Attributes:
        blocks: the stored tensors, their rows counted one after the other.
        order: for each row, which of those it is; None when it is them all in order.
        dtype: of the numbers that are given.
    """

    blocks: tuple[Block, ...]
    order: Indices | None
    dtype: torch.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(block.rows.nbytes for block in self.blocks)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows: [stop - start, I]."""
        wanted = np.arange(start, stop) if self.order is None else self.order[start:stop]
        made: Tensor | None = None
        first = 0
        for block in self.blocks:
            here = (wanted >= first) & (wanted < first + block.rows.shape[0])
            if here.any():
                inside = wanted[here] - first
                low, high = int(inside.min()), int(inside.max()) + 1  # rows of a head at most lie between
                part = block.read(low, high)[torch.from_numpy(inside - low)]
                made = part.new_empty(stop - start, part.shape[1]) if made is None else made
                made[torch.from_numpy(here)] = part
            first += block.rows.shape[0]
        if made is None:
            raise CheckpointError(f"{self.blocks[0].rows.file.name}: expected rows that it has, got {start} to {stop}.")
        return made.to(self.dtype)


def library() -> Any:
    """The package gguf. Raises BackendError when it is not installed."""
    return required("gguf", "read GGUF", "'spectral-surgery[gguf]'")


def stored_as(tensor: Any, file: Path) -> Block:
    """A tensor of a GGUF file, from what its reader says of it."""
    gguf = library()
    kind = gguf.GGMLQuantizationType(tensor.tensor_type)
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    columns = shape[-1] if shape else 1
    known = kind.name in PLAIN or kind in gguf.quants._type_traits
    if columns % elements or not known:
        raise CheckpointError(
            f"{file.name}: {named([tensor.name])}: expected a kind that the package gguf makes numbers of, in whole"
            f" blocks, got {kind.name} {list(shape)}. Give the checkpoint it was made from."
        )
    width = columns // elements * size
    count = int(np.prod(shape[:-1], dtype=np.int64))
    return Block(TensorInfo(tensor.name, "U8", (count, width), file, int(tensor.data_offset), count * width), kind.name)


def dtype_of(blocks: Sequence[Block]) -> str:
    """What a parameter of these tensors is: as they are stored, or bfloat16 where numbers are made."""
    kinds = {block.kind for block in blocks}
    return PLAIN.get(kinds.pop(), "BF16") if len(kinds) == 1 else "BF16"
