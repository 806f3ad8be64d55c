"""Levels that stay in host memory and cross the bus as they are, half a byte or one byte a weight, at every product."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul.int4 import Int4Form, int4_form, outlier_bytes
from spectral_surgery.matmul.int8 import Int8Form, int8_bytes, int8_form
from spectral_surgery.matmul.outliers import add_adjoint, add_levels, add_product
from spectral_surgery.matmul.row_ranges import RowRanges
from spectral_surgery.matmul.transfers import BUFFER_BYTES, bus

_MOST_BEYOND = 1 << 12  # at most one code in 4096 may be an outlier of half a byte: these stay on the device


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
class StreamedForm:
    """Codes in host memory; see `Form`.

    Attributes:
        host: of an `Int4Form` or an `Int8Form`.
        scale: [1] or [I] float32; the device of the layer.
        row_scale: [0] or [O] float32, there too.
        grid: [2] int8 of an `Int4Form`, on that device; [0] of an `Int8Form`.
        places: of the outliers, as in these forms, on that device.
        beyond: of the outliers, the same.
        basis: transform, tile and axes.
        columns: I.
    """

    host: HostMatrix
    scale: Tensor
    row_scale: Tensor
    grid: Tensor
    places: Tensor
    beyond: Tensor
    basis: Basis
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return (len(self.host.codes), self.columns)

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, I] to [T, O]."""
        with self._blocks(x.device) as blocks:
            y = torch.cat([self._form(block).product(x, accuracy) for _, block in blocks], 1)
        return add_product(y, x, self.places, self.beyond, self.columns)

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """[T, O] to [T, I]."""
        out: Tensor | None = None
        with self._blocks(g.device) as blocks:
            for start, block in blocks:
                part = self._form(block).adjoint(g[:, start : start + len(block)], accuracy)
                out = part if out is None else out.add_(part)
        if out is None:
            return g.new_zeros((len(g), self.columns))
        return add_adjoint(out, g, self.places, self.beyond, self.columns)

    def levels(self, rows: Tensor) -> Tensor:
        """[n] int64 to [n, I] int8 on the device of the rows; only these cross the bus."""
        form = self._form(self.host.codes[rows.cpu()].to(rows.device))
        levels = form.levels(torch.arange(len(rows), device=rows.device))
        if not len(self.places):
            return levels
        return add_levels(levels.to(self.beyond.dtype), rows, self.places, self.beyond, self.columns)

    def recorded_levels(self) -> Tensor:
        """[O, I] int8 on the device of the layer, where all of them arrive at once."""
        form = self._form(self.host.codes.to(self.scale.device))
        return replace(form, places=self.places, beyond=self.beyond).recorded_levels()

    def _blocks(self, device: torch.device) -> closing[Generator[tuple[int, Tensor]]]:
        codes = self.host.codes
        return closing(bus(device).blocks(codes, BUFFER_BYTES // codes.shape[1]))

    def _form(self, codes: Tensor) -> Int4Form | Int8Form:
        scales = self.scale, self.row_scale
        nothing = self.places[:0], self.beyond[:0]  # of this block alone: those of the whole are added at the end
        if self.grid.numel():
            return Int4Form(codes, *scales, self.grid, *nothing, self.basis, self.columns)
        return Int8Form(codes, *scales, *nothing, self.basis)


def streamed_bytes(weights: int, stored: int) -> int:
    """Bytes on the device, at most; the codes are in host memory."""
    return max(outlier_bytes(weights, _MOST_BEYOND), int8_bytes(weights, stored) - weights)


def streamed_form(ranges: RowRanges) -> StreamedForm:
    """Levels of a matrix in host memory: 4 bits each where they fit, else 8.

    Raises ConfigError when they do not fit 8 bits, or a row is larger than a buffer.
    """
    form: Int4Form | Int8Form
    try:
        form = int4_form(ranges, _MOST_BEYOND)
    except ConfigError:
        form = int8_form(ranges)
    codes = form.codes
    if codes.shape[1] > BUFFER_BYTES:
        raise ConfigError(
            f"resident 'streamed': a row of {codes.shape[1]} bytes; expected up to {BUFFER_BYTES}. Use int8."
        )
    grid = form.grid if isinstance(form, Int4Form) else codes.new_empty(0)
    host, scales, outliers = HostMatrix.of(codes), (form.scale, form.row_scale), (form.places, form.beyond)
    return StreamedForm(host, *scales, grid, *outliers, form.basis, form.shape[1])
