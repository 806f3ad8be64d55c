"""Checkpoints of bitsandbytes: 8 bits with a scale for each row, and 4 bits that the library makes numbers of.

Source: bitsandbytes 0.50; the names are those of its `QuantState.as_dict(packed=True)`, behind the name of a weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import required
from spectral_surgery.files.header import TensorInfo, named
from spectral_surgery.files.reader import read_bytes, read_flat, read_tensor
from spectral_surgery.files.sources.base import Settings, SourceKind, Tensors, stands_for, wrong
from spectral_surgery.files.sources.scaled import scaled

_LARGEST = 127.0  # of a row, which its SCB belongs to
_STATE, _ROW_SCALES, _LAYOUT = ".quant_state.bitsandbytes__", "SCB", "weight_format"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class FourBits:
    """A matrix as codes of 4 bits; so many in a row have a scale together, and the scales may have scales again.

    Attributes:
        codes: two a byte.
        parts: scales and tables, by the names of the library.
        state: U8, JSON of its settings.
        block: codes that have a scale together; a row is some of them.
    """

    codes: TensorInfo
    parts: Mapping[str, TensorInfo]
    state: TensorInfo
    shape: tuple[int, ...]
    block: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of all of it."""
        return sum(info.nbytes for info in (self.codes, self.state, *self.parts.values()))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix: [R, I] bfloat16. Raises BackendError when the library is not installed."""
        library = required("bitsandbytes.functional", "read the weights", "bitsandbytes")
        stored = {name: read_tensor(info) for name, info in self.parts.items()}
        kind = self.state.name.rpartition(".")[2]
        stored[f"quant_state.{kind}"] = read_tensor(self.state)
        whole = library.QuantState.from_dict(stored, device=torch.device("cpu"))
        scales = whole.absmax
        if whole.nested:
            scales = library.dequantize_blockwise(scales, whole.state2) + whole.offset
        width = self.shape[-1]
        here = scales[start * width // self.block : stop * width // self.block].float()
        if not bool(torch.isfinite(here).all()):
            raise wrong(self.parts["absmax"], "has NaN or infinite scales; expected finite ones.")
        state = library.QuantState(
            absmax=here,
            shape=torch.Size((stop - start, width)),
            code=whole.code,
            blocksize=self.block,
            quant_type=whole.quant_type,
            dtype=torch.float32,
        )
        codes = read_flat(self.codes, start * width // 2, stop * width // 2).reshape(-1, 1)
        made: Tensor = library.dequantize_4bit(codes, state)
        return made.bfloat16()


def read_bitsandbytes(tensors: Tensors, settings: Settings) -> dict[str, TensorInfo]:  # noqa: ARG001 - tensors say all
    """The plain tensors of a checkpoint of bitsandbytes.

    Raises CheckpointError when scales are missing or do not fit.
    """
    states = {name.partition(_STATE)[0]: info for name, info in tensors.items() if _STATE in name}
    plain: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for name, info in tensors.items():
        if name in states:
            parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
            plain[name] = _four_bits(info, parts, states[name])
            used |= {name, states[name].name, *(part.name for part in parts.values())}
        elif name.endswith(".weight") and info.dtype == "I8":
            stem = name.removesuffix("weight")
            scales = tensors.get(stem + _ROW_SCALES)
            if scales is None:
                raise wrong(info, f"is I8 and has no scales; expected {named([stem + _ROW_SCALES])} beside it.")
            plain[name] = stands_for(info, scaled(info, scales, None, divisor=_LARGEST))
            used |= {name, scales.name, stem + _LAYOUT}
    return plain | {name: info for name, info in tensors.items() if name not in used}


def _four_bits(info: TensorInfo, parts: Mapping[str, TensorInfo], state: TensorInfo) -> TensorInfo:
    try:
        said: Any = json.loads(bytes(read_bytes(state, 0, state.nbytes)))
        shape, block = tuple(map(int, said["shape"])), int(said["blocksize"])
    except (ValueError, KeyError, TypeError):
        raise wrong(state, "is no JSON with shape and blocksize; expected what bitsandbytes writes.") from None
    count = torch.Size(shape).numel()
    nested = "nested_blocksize" in said
    expected = _PARTS if nested else _PARTS[:2]
    if parts.keys() < set(expected):
        raise wrong(info, f"lacks {named(sorted(set(expected) - parts.keys()))}; expected them beside it.")
    if info.dtype != "U8" or 2 * info.numel != count or parts["absmax"].numel * block != count or shape[-1] % block:
        raise wrong(info, f"does not hold {list(shape)} in blocks of {block}; expected whole blocks in every row.")
    return stands_for(info, FourBits(info, dict(parts), state, shape, block), shape=shape)


BITSANDBYTES = SourceKind("bitsandbytes", read_bitsandbytes)
