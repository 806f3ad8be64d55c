"""What a kind of source is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import DTYPE_BITS, Decoder, TensorInfo, named

Tensors = Mapping[str, TensorInfo]
Settings = Mapping[str, object]
Reading = Callable[[Tensors, Settings], dict[str, TensorInfo]]


@dataclass(frozen=True)
class SourceKind:
    """How another tool quantises a checkpoint.

    Attributes:
        name: ``quant_method`` in its configuration.
        read: finds the plain tensors by name, given the stored ones and the settings of the quantisation. Tensors that
            are not quantised stay; scales and the like are gone. It raises CheckpointError where something is missing
            or does not fit.
    """

    name: str
    read: Reading


def stands_for(
    info: TensorInfo, decoder: Decoder, *, name: str | None = None, shape: tuple[int, ...] | None = None
) -> TensorInfo:
    """The bfloat16 tensor that a stored one stands for, of the same name and shape unless others are given."""
    sizes = info.shape if shape is None else shape
    nbytes = prod(sizes) * DTYPE_BITS["BF16"] // 8
    return TensorInfo(name or info.name, "BF16", sizes, info.file, info.start, nbytes, decoder)


def wrong(info: TensorInfo, what: str) -> CheckpointError:
    """An error about a stored tensor: what it is, and what was expected."""
    return CheckpointError(f"{info.file.name}: {named([info.name])} {what} Download it again.")
