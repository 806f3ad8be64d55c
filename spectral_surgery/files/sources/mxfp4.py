"""MXFP4 experts, as gpt-oss has them: numbers of 4 bits, 32 of which share a power of two.

Source: OCP Microscaling Formats (MX) v1.0; the layout is that of transformers' `integrations/mxfp4.py`, where experts
are stored with outputs before inputs, and stand for matrices with inputs before outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.files.header import TensorInfo, named
from spectral_surgery.files.reader import read_flat
from spectral_surgery.files.sources.base import Settings, SourceKind, Tensors, stands_for, wrong

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32
_NAN, _BIAS = 255, 127
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Mxfp4:
    """Experts as codes and powers of two.

    Attributes:
        blocks: [E, O, I / 32, 16] U8, two codes a byte, the first one lower.
        scales: [E, O, I / 32] U8, exponents.
    """

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrices [I, O] of all experts, one above the other: [R, O] bfloat16.

        Raises CheckpointError when a scale is not a number.
        """
        height = self.blocks.shape[2] * _GROUP
        experts = range(start // height, -(-stop // height))
        return torch.cat(
            [self._columns(e, max(start - e * height, 0), min(stop - e * height, height)) for e in experts]
        )

    def _columns(self, expert: int, start: int, stop: int) -> Tensor:
        """Inputs of one expert, of which all bytes are read: [stop - start, O] bfloat16."""
        _, outputs, groups, size = self.blocks.shape
        width, first, last = groups * size, start // _GROUP, -(-stop // _GROUP)
        stored = read_flat(self.blocks, expert * outputs * width, (expert + 1) * outputs * width)
        powers = read_flat(self.scales, expert * outputs * groups, (expert + 1) * outputs * groups)
        powers = powers.reshape(outputs, groups)[:, first:last]
        if bool((powers == _NAN).any()):
            raise wrong(self.scales, "has NaN scales; expected powers of two.")
        codes = stored.reshape(outputs, width)[:, first * size : last * size]
        pairs = _PAIRS[codes.int()].view(torch.bfloat16)  # [O, numbers]
        pairs.unflatten(1, (-1, _GROUP)).mul_(_POWERS[powers.int()][:, :, None])
        return pairs[:, start - first * _GROUP : stop - first * _GROUP].T.contiguous()


def _pairs() -> Tensor:
    """The two numbers of each byte, as one element of 32 bits: [256] int32."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), 1).view(torch.int32).reshape(-1)


_PAIRS = _pairs()
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - _BIAS).bfloat16()


def read_mxfp4(tensors: Tensors, settings: Settings) -> dict[str, TensorInfo]:  # noqa: ARG001 - the settings say no more
    """The plain tensors of a checkpoint with MXFP4 experts.

    Raises CheckpointError when scales are missing or do not fit.
    """
    stems = {name.removesuffix(_BLOCKS): info for name, info in tensors.items() if name.endswith(_BLOCKS)}
    plain = dict(tensors)
    for stem, blocks in stems.items():
        scales = tensors.get(stem + _SCALES)
        if scales is None:
            raise wrong(blocks, f"has no scales; expected {named([stem + _SCALES])} beside it.")
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] * 2 != _GROUP:
            raise wrong(blocks, f"is {blocks.dtype} {list(blocks.shape)}; expected U8 [experts, outputs, groups, 16].")
        if scales.dtype != "U8" or scales.shape != blocks.shape[:3]:
            raise wrong(scales, f"is {scales.dtype} {list(scales.shape)}; expected U8 {list(blocks.shape[:3])}.")
        experts, outputs, groups, _ = blocks.shape
        del plain[stem + _BLOCKS], plain[stem + _SCALES]
        shape = (experts, groups * _GROUP, outputs)
        plain[stem] = stands_for(blocks, Mxfp4(blocks, scales), name=stem, shape=shape)
    return plain


MXFP4 = SourceKind("mxfp4", read_mxfp4)
