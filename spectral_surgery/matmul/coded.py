"""The stored frames themselves, decoded a block of rows at a time while others multiply."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, frame_spans
from spectral_surgery.codec.frame_bytes import decode_frame
from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul import integer
from spectral_surgery.matmul.code_blocks import as_encoded
from spectral_surgery.matmul.levels import levels_of
from spectral_surgery.matmul.row_ranges import RowRanges
from spectral_surgery.matmul.workers import Span, map_ordered

_BLOCK = 1 << 20  # codes decoded at a time by one thread


@dataclass(frozen=True)
class CodedForm:
    """Entropy-coded frames; see `Form`.

    Attributes:
        data: [bytes] uint8, the frames.
        ends: [frames + 1] int64 byte offsets.
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        offset: [1] float32, shift of the reconstruction points, in steps.
        basis: transform, tile and axes.
        starts: [frames + 1] int64, first rows of the frames, which are whole tiles.
        shape: (O, I).
    """

    data: Tensor
    ends: Tensor
    scale: Tensor
    row_scale: Tensor
    offset: Tensor
    starts: Tensor
    basis: Basis
    shape: tuple[int, int]

    def product(self, x: Tensor, accuracy: torch.dtype, *, transposed: bool = False) -> Tensor:
        """[T, I] to [T, O]; transposed: [T, O] to [T, I]."""
        operand = integer.prepare(x, accuracy)

        def of_span(span: Span) -> Tensor:
            levels, parts = self._block(span, x.device)
            start, stop = (int(self.starts[frame]) for frame in span)
            some = operand.terms(start, stop) if transposed else operand
            y = integer.product(some, levels, transposed=transposed)
            return y if parts == 1 else y.div_(parts)

        parts = map_ordered(of_span, self._spans())
        return reduce(Tensor.add_, parts) if transposed else torch.cat(list(parts), 1)

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] float32; each frame that holds one of them is decoded once."""
        out = torch.empty((len(rows), self.shape[1]), device=rows.device)
        frames = torch.searchsorted(self.starts, rows, right=True) - 1
        for frame in sorted(set(frames.tolist())):
            levels, parts = self._block((frame, frame + 1), rows.device)
            here = frames == frame
            out[here] = levels[rows[here] - self.starts[frame]].to(torch.float32) / parts
        return out

    def recorded_levels(self) -> Tensor:
        """Refused. Raises ConfigError always: frames are decoded by Python."""
        raise ConfigError(
            "resident 'coded': is decoded by Python, which no export, trace or torch.func follows; expected int8 or"
            " streamed. Load the model with one of them, or call model.dequantize() first."
        )

    def _spans(self) -> list[Span]:
        frames = len(self.ends) - 1
        each = max(1, _BLOCK * frames // math.prod(self.shape))
        return [(first, min(first + each, frames)) for first in range(0, frames, each)]

    def _block(self, span: Span, device: torch.device) -> tuple[Tensor, float]:
        parts = [self._codes(frame) for frame in range(*span)]
        codes = parts[0] if len(parts) == 1 else torch.cat(parts)
        levels, scale = levels_of(codes, float(self.offset))
        return levels.to(device), scale

    def _codes(self, frame: int) -> Tensor:
        first, last = self.ends[frame : frame + 2].tolist()
        rows = int(self.starts[frame + 1] - self.starts[frame])
        data = self.data[first:last].cpu().numpy().data
        return torch.from_numpy(decode_frame(data, (rows, self.shape[1])))


def coded_form(ranges: RowRanges) -> CodedForm:
    """The stored frames of a matrix of one offset, as they are."""
    encoded = [as_encoded(ranges.read(number)) for number in range(len(ranges.outlines))]
    frames = [frame for spectrum in encoded for frame in spectrum.frames]
    heights = [stop - start for one in encoded for start, stop in frame_spans(one.shape[0], one.rows_per_frame)]
    scale, row_scale = ranges.scales([1] * len(encoded))
    return CodedForm(
        _joined(frames),
        torch.tensor([0, *map(len, frames)]).cumsum(0),
        scale.clone(),
        row_scale,
        torch.tensor([encoded[0].offset], dtype=torch.float32),
        torch.tensor([0, *heights]).cumsum(0),
        ranges.basis,
        ranges.shape,
    )


def _joined(frames: Sequence[bytes | memoryview]) -> Tensor:
    """One frame after the other, where they are if they are so in memory, as those that were just read."""
    owner: object = frames[0].obj if isinstance(frames[0], memoryview) else None
    places = [(np.frombuffer(frame, np.uint8).ctypes.data, len(frame)) for frame in frames]
    adjacent = all(start + length == following for (start, length), (following, _) in pairwise(places))
    if isinstance(owner, np.ndarray) and adjacent and sum(map(len, frames)) == owner.nbytes:
        return torch.from_numpy(owner)
    return torch.frombuffer(bytearray().join(frames), dtype=torch.uint8)
