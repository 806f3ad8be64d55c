"""Levels that stay in host memory and cross the bus as they are, half a byte or one byte a weight, at every product."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul.level_form import LevelForm, level_form
from spectral_surgery.matmul.outliers import add_levels, add_product
from spectral_surgery.matmul.planes import LAYOUTS
from spectral_surgery.matmul.row_ranges import RowRanges
from spectral_surgery.matmul.transfers import BUFFER_BYTES, bus

# at most one code in 4096 may be an outlier of half a byte: these stay on the device
_STREAMED = replace(LAYOUTS["int4"], most_beyond=1 << 12), LAYOUTS["int8"]


@dataclass(frozen=True)
class HostMatrix:
    """A matrix that no layer moves to its device; pinned where there is a GPU.

    Attributes:
        codes: [O, n] int8.
    """

    codes: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> HostMatrix:
        """Bring codes to where copies to a GPU start from."""
        codes = codes.cpu()
        return cls(codes.pin_memory() if torch.cuda.is_available() else codes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also those in other processes, are pinned as this is."""
        return HostMatrix.of, (self.codes,)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self.codes.nbytes


@dataclass(frozen=True)
class StreamedForm(LevelForm):
    """Levels whose first plane is in host memory, and all other tensors on the device of the layer; see `LevelForm`.

    Attributes:
        codes: [0, 0].
        host: the first plane.
    """

    host: HostMatrix

    @property
    def kind(self) -> None:
        """None: kernels cannot read them."""

    def product(self, x: Tensor, accuracy: torch.dtype, *, transposed: bool = False) -> Tensor:
        """[T, I] to [T, O]; transposed: [T, O] to [T, I]."""
        parts: list[Tensor] = []
        with self._on(x.device) as blocks:
            for start, block in blocks:
                some = x[:, start : start + len(block)] if transposed else x
                part = self._of(block).product(some, accuracy, transposed=transposed)
                parts = [parts[0].add_(part)] if transposed and parts else [*parts, part]
        return add_product(torch.cat(parts, 1), x, self.places, self.beyond, self.shape[1], transposed=transposed)

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8 or float32 on the device of the rows; only these cross the bus."""
        form = self._of(self.host.codes[rows.cpu()].to(rows.device))
        levels = form.levels(torch.arange(len(rows), device=rows.device))
        if not len(self.places):
            return levels
        return add_levels(levels.to(self.beyond.dtype), rows, self.places, self.beyond, self.shape[1])

    def recorded_levels(self) -> Tensor:
        """[O, I] int8 or float32 on the device of the layer, where all of them arrive at once."""
        form = self._of(self.host.codes.to(self.scale.device))
        return replace(form, places=self.places, beyond=self.beyond).recorded_levels()

    def _on(self, device: torch.device) -> closing[Generator[tuple[int, Tensor]]]:
        codes = self.host.codes
        return closing(bus(device).blocks(codes, BUFFER_BYTES // codes.shape[1]))

    def _of(self, codes: Tensor) -> LevelForm:
        """Of a block alone, without outliers: those of the whole are added at the end."""
        values = {field.name: getattr(self, field.name) for field in fields(LevelForm)}
        values |= {"codes": codes, "places": self.places[:0], "beyond": self.beyond[:0]}
        return LevelForm(**values | {"shape": (len(codes), self.shape[1])})


def streamed_bytes(weights: int, stored: int) -> int:
    """Bytes on the device, at most; the codes are in host memory."""
    return max(layout.most_bytes(weights, stored) - layout.planes[0].width(weights) for layout in _STREAMED)


def streamed_form(ranges: RowRanges) -> StreamedForm:
    """Levels of a matrix in host memory: 4 bits each where they fit, else 8.

    Raises ConfigError when they do not fit 8 bits, or a row is larger than a buffer.
    """
    narrow, wide = _STREAMED
    try:
        form = level_form(ranges, narrow)
    except ConfigError:
        form = level_form(ranges, wide)
    width = form.codes.shape[1]
    if width > BUFFER_BYTES:
        raise ConfigError(f"resident 'streamed': a row of {width} bytes; expected up to {BUFFER_BYTES}. Use int8.")
    values = {field.name: getattr(form, field.name) for field in fields(form)}
    return StreamedForm(**values | {"codes": form.codes.new_empty((0, 0))}, host=HostMatrix.of(form.codes))
