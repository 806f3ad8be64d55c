"""A weight that is trained in its kept spectrum: positions are frozen, and the quantiser is in the loop.

Where codes are points of the lattice nothing was left out by a threshold, and all coefficients are trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.quantized import QuantizedSpectrum
from spectral_surgery.codec.quantizers.lattice import LatticePoints, points_of
from spectral_surgery.errors import ShapeError

_TILE = 64  # rows: whole blocks of the lattice, and all frequencies
_FINER = 1.2
_INSIDE = 0.98  # of a cell, in which training may start
_WIDE = 0.5  # steps of offset: coefficients were kept by a threshold, and not by rounding


class KeptSpectrum(nn.Module):
    """A parametrization (torch.nn.utils.parametrize): values [K] of the kept coefficients to the weight.

    Values are coefficients in units of their root mean square. The weight is computed from quantised values, and its
    gradient goes to the values as if they had not been rounded (straight-through), so that what is stored is what was
    trained. A coefficient that is trained to zero stays in training; one that was zero at the start is never touched.

    Attributes:
        shape: of the weight.
        start: values [K] that the training starts from.
        dead_zone: times the usual one, which ends halfway between zero and the first level; for points of the lattice,
            the root of what a bit is worth, times the usual.
    """

    def __init__(
        self, spectra: Sequence[QuantizedSpectrum], shape: Sequence[int], original: Tensor | None = None
    ) -> None:
        """Freeze positions and steps.

        Args:
            spectra: of consecutive row ranges of the weight, seen as a matrix.
            original: the weight that the codes were rounded from: training starts there, with finer steps where a
                threshold had chosen what to keep. Without, it starts somewhere in the cells of what is stored: from
                their middles, small steps would change nothing until all values leave their cells at once (the KL of a
                model of 135 M parameters went from 1.5 to 6 in five steps).

        Raises:
            ShapeError: when the spectra do not have as many coefficients as the weight.
        """
        super().__init__()
        self.shape, self.dead_zone = tuple(shape), 1.0
        if sum(math.prod(spectrum.shape) for spectrum in spectra) != math.prod(self.shape):
            sizes = [list(spectrum.shape) for spectrum in spectra]
            raise ShapeError(f"KeptSpectrum: expected spectra of the size of {list(self.shape)}, got {sizes}.")
        self._grids = [_trainable(spectrum, finer=original is not None) for spectrum in spectra]
        self._scales: list[float] = []
        self._points: list[LatticePoints | None] = []
        starts, row = [], 0
        for part, spectrum in enumerate(spectra):
            stored = spectrum.coefficients().reshape(-1)
            points = points_of(spectrum.codes.cpu())
            positions = stored.nonzero()[:, 0] if points is None else torch.arange(stored.numel())
            values = stored[positions]
            if original is not None:
                rows = original.reshape(-1, spectrum.shape[1])[row : row + spectrum.shape[0]]
                values = (
                    Basis(spectrum.transform, spectrum.tile, spectrum.axes).forward(rows.cpu()).reshape(-1)[positions]
                )
                if points is not None:
                    points = points_of(spectrum.codes.cpu(), values.reshape(spectrum.shape) / spectrum.step.cpu())
            row += spectrum.shape[0]
            self._points.append(points)
            self._scales.append(float(values.square().mean().sqrt()) if len(values) else 1.0)
            starts.append(values / self._scales[-1])
            self.register_buffer(f"positions_{part}", positions.to(_index_dtype(stored.numel())))
            step = self._grids[part].step
            steps = step if step.numel() == 1 else step.expand(spectrum.shape).reshape(-1)[positions]
            self.register_buffer(f"steps_{part}", steps)
            if original is None and points is None:
                cell = _INSIDE * min(1.0, 1.0 + self._grids[part].offset)  # the first one may begin at the dead zone
                starts[-1] = starts[-1] + cell * _spread(len(values)).to(values) * steps / self._scales[-1]
        self.start = torch.cat(starts)

    def forward(self, values: Tensor) -> Tensor:
        """[K] float32 to the weight, in float32; autocast does not reach it."""
        with torch.autocast(values.device.type, enabled=False):
            rows = [self._rows(part, numbers) for part, numbers in enumerate(self._split(values))]
            return (rows[0] if len(rows) == 1 else torch.cat(rows)).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The values that training starts from, whatever the weight is."""
        return self.start.to(weight.device)

    def spectra(self, values: Tensor) -> list[QuantizedSpectrum]:
        """The spectra that values [K] stand for, one for each row range."""
        parts = []
        for part, numbers in enumerate(self._split(values.detach())):
            grid = self._grids[part]
            codes = torch.zeros(math.prod(grid.shape), dtype=torch.int32)
            codes[self._positions(part).cpu().long()] = self._codes(part, numbers, self.dead_zone).cpu().to(torch.int32)
            parts.append(replace(grid, codes=codes.reshape(grid.shape)))
        return parts

    def bits(self, values: Tensor, dead_zone: float, every: int = 1) -> float:
        """About what the codes of values [K] take, tables aside.

        Args:
            every: one in so many tiles of rows, at least one, stands for all.
        """
        total = 0.0
        for part, numbers in enumerate(self._split(values)):
            rows, columns = self._grids[part].shape
            spans = [(row, min(row + _TILE, rows)) for row in range(0, rows, _TILE * every)]
            seen, points = sum(stop - start for start, stop in spans), self._points[part]
            codes = self._codes(part, numbers, dead_zone, spans if seen < rows else None)
            if points is None:
                found = _entropy(seen * columns, codes)
            else:
                found = points.bits(codes.to(torch.int32).reshape(-1, columns).cpu())
            total += found * rows / seen
        return total

    def _rows(self, part: int, values: Tensor) -> Tensor:
        grid = self._grids[part]
        codes = self._codes(part, values.detach(), self.dead_zone)
        stored = (codes + codes.sign() * grid.offset) * self.get_buffer(f"steps_{part}")
        exact = values * self._scales[part]
        quantised = exact + (stored - exact.detach())
        flat = cast(Tensor, _Placed.apply(quantised, self._positions(part), math.prod(grid.shape)))
        return Basis(grid.transform, grid.tile, grid.axes).inverse(flat.reshape(grid.shape))

    def _codes(
        self, part: int, values: Tensor, dead_zone: float, spans: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Integers, as floats: zero in the dead zone, else the nearest of the points that can be stored.

        Args:
            spans: of rows, of whole tiles; None for all.
        """
        offset, points, steps = self._grids[part].offset, self._points[part], self.get_buffer(f"steps_{part}")
        if spans is not None:
            edges = torch.tensor(spans, device=values.device) * self._grids[part].shape[1]
            places = torch.searchsorted(self._positions(part), edges.to(self._positions(part).dtype)).tolist()
            values, steps = (
                own if own.numel() == 1 else torch.cat([own[start:stop] for start, stop in places])
                for own in (values, steps)
            )
        if points is not None:
            scaled = (values * self._scales[part] / steps).reshape(-1, self._grids[part].shape[1])
            stricter = replace(points, slope=points.slope * dead_zone**2)
            return stricter.levels(scaled.cpu(), threads=torch.get_num_threads()).reshape(-1).to(values)
        levels = values.abs() * self._scales[part] / steps
        nearest = (levels - offset).round_().clamp_(min=1.0)
        return torch.where(levels < dead_zone * (1 + offset) / 2, 0.0, nearest).copysign(values)

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, [len(self._positions(part)) for part in range(len(self._grids))])

    def _positions(self, part: int) -> Tensor:
        return self.get_buffer(f"positions_{part}")


class _Placed(torch.autograd.Function):
    """Values [K] at positions [K] of zeros [N]. Narrow positions are kept for the way back, where torch keeps wide."""

    @staticmethod
    def forward(values: Tensor, positions: Tensor, size: int) -> Tensor:
        """[K] to [N]."""
        return values.new_zeros(size).index_copy_(0, positions.long(), values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:  # noqa: ARG004 - torch's
        """Keep the positions."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """[N] to [K]."""
        (positions,) = ctx.saved_tensors
        return gradient.index_select(0, positions), None, None


def _entropy(weights: int, codes: Tensor) -> float:
    """Bits of the codes of some weights, of which all but these are zero."""
    counts = torch.bincount(codes.abs().to(torch.int64)).double()
    nonzero = float(counts[1:].sum())
    counts[0] = weights - nonzero
    shares = counts[counts > 0] / weights
    return weights * float(-(shares * shares.log2()).sum()) + nonzero  # and a sign


def _spread(count: int) -> Tensor:
    """Numbers from -0.5 to 0.5, the same at every call."""
    return torch.rand(count, generator=torch.Generator().manual_seed(0)) - 0.5


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


def _trainable(spectrum: QuantizedSpectrum, *, finer: bool) -> QuantizedSpectrum:
    """The grid that a spectrum is trained on: without codes to speak of, and with levels below its dead zone.

    A spectrum that was kept by a threshold has coarse steps, since its error is that of what was dropped; once trained,
    it gains from finer ones.
    """
    step, offset = spectrum.step.float(), spectrum.offset
    if finer and offset >= _WIDE:
        step, offset = step / _FINER, offset * _FINER
    empty = torch.zeros(1, dtype=torch.int8).expand(spectrum.shape)
    return replace(spectrum, codes=empty, step=step, offset=offset - round(offset))
