"""The stored form of a matrix, what it cost, and the way back.

A frame is a whole number of rows of tiles with at least 2^20 coefficients, so that neither the tables of the entropy
coder nor the calls that decode it cost anything, and it decodes alone. Floating-point work on it takes smaller blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.codec.frame_bytes import decode_frame
from spectral_surgery.codec.hugepages import empty
from spectral_surgery.codec.parallel import one_torch_thread, parallel_map
from spectral_surgery.codec.quantized import QuantizedSpectrum, dequantize
from spectral_surgery.transforms import TRANSFORMS, tiles

FRAME_SIZE = 1 << 20  # coefficients: smaller frames pay for the calls that decode them, larger ones delay the first row
BLOCK_SIZE = 1 << 18  # coefficients in float32 that are worked on at a time: they stay in cache
COLUMN_STEP_BITS = 16  # of each of many steps, stored in bfloat16


@dataclass(frozen=True)
class Basis:
    """The transform of a matrix: name in TRANSFORMS, tile side, transformed axes (0 for O, 1 for I)."""

    transform: str = "dct"
    tile: int = 64
    axes: tuple[int, ...] = (0, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, I] any float type to [rows, I] float32 coefficients; rows start on a tile boundary."""
        return tiles.forward(rows.to(torch.float32), TRANSFORMS[self.transform], self.tile, self.axes)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Inverse of `forward`."""
        return tiles.inverse(coefficients, TRANSFORMS[self.transform], self.tile, self.axes)

    def blocks(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Row ranges of [rows, I] in which to transform it: whole tiles, about BLOCK_SIZE coefficients."""
        return frame_spans(shape[0], _height(shape[1], self.tile, BLOCK_SIZE))


@dataclass(frozen=True)
class EncodedSpectrum:
    """The stored form of one matrix.

    Attributes:
        frames: encoded frames, each of ``rows_per_frame`` rows (the last one may have fewer).
        shape: (O, I).
        rows_per_frame: rows of a frame, a multiple of the tile.
        step: reconstruction step, see QuantizedSpectrum.
        offset: reconstruction offset, in steps.
        basis: transform, tile and axes.
    """

    frames: tuple[bytes | memoryview, ...]
    shape: tuple[int, int]
    rows_per_frame: int
    step: Tensor
    offset: float
    basis: Basis

    @property
    def stored_bytes(self) -> int:
        """Bytes of the frames, their 64-bit offsets, the steps and the offset."""
        return sum(map(len, self.frames)) + 8 * (len(self.frames) + 1) + steps_bytes(self.step.numel() + 1)

    def codes(self, frame: int, out: Tensor | None = None) -> Tensor:
        """[rows, I] codes of one frame; in ``out``, contiguous [rows, I] int8, where it is given and they are int8."""
        start = frame * self.rows_per_frame
        stop = min(start + self.rows_per_frame, self.shape[0])
        place = None if out is None else out.numpy()
        return torch.from_numpy(decode_frame(self.frames[frame], (stop - start, self.shape[1]), place))

    def decode(self) -> QuantizedSpectrum:
        """Every frame decoded, as one spectrum of codes."""
        parts = [self.codes(i) for i in range(len(self.frames))]
        widest = max((p.dtype for p in parts), key=lambda d: d.itemsize)
        codes = torch.cat([p.to(widest) for p in parts])
        return QuantizedSpectrum(codes, self.step, self.offset, self.basis.transform, self.basis.tile, self.basis.axes)

    def to_dense(self, *, threads: int = 1) -> Tensor:
        """The matrix: [O, I] float32."""
        if len(self.frames) == 1 and len(self.basis.blocks(self.shape)) == 1:
            with torch.inference_mode(False), one_torch_thread():
                return self.basis.inverse(dequantize(self.codes(0), self.step, self.offset))
        with torch.inference_mode(False):  # which other threads would not be in
            dense = empty(self.shape, torch.float32)
            rows = dense.split(self.rows_per_frame)
        parallel_map(lambda frame: self._decode_to(rows[frame], frame), range(len(self.frames)), threads)
        return dense

    def _decode_to(self, dense: Tensor, frame: int) -> None:
        codes = self.codes(frame)
        for start, stop in self.basis.blocks(codes.shape):
            dense[start:stop] = self.basis.inverse(dequantize(codes[start:stop], self.step, self.offset))


@dataclass(frozen=True)
class EncodingReport:
    """What an encoding cost and what it left; sums, so that the reports of several matrices add up.

    Attributes:
        weights: number of weights.
        stored_bytes: see EncodedSpectrum.
        kept: non-zero coefficients.
        energy: squared norm of the matrix.
        error_energy: squared norm of what is lost, measured on the decoded frames.
        stored_energy: squared norm of the decoded matrix.
    """

    weights: int
    stored_bytes: int
    kept: int
    energy: float
    error_energy: float
    stored_energy: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, every byte counted."""
        return 8 * self.stored_bytes / max(self.weights, 1)

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the matrix; 0 for a zero matrix."""
        return math.sqrt(self.error_energy / self.energy) if self.energy else 0.0

    @property
    def density(self) -> float:
        """Fraction of coefficients kept."""
        return self.kept / max(self.weights, 1)

    def __add__(self, other: EncodingReport) -> EncodingReport:
        """Report of two matrices together."""
        return EncodingReport(
            self.weights + other.weights,
            self.stored_bytes + other.stored_bytes,
            self.kept + other.kept,
            self.energy + other.energy,
            self.error_energy + other.error_energy,
            self.stored_energy + other.stored_energy,
        )


def steps_bytes(count: int) -> int:
    """Bytes of the steps of a matrix and its offset, ``count`` numbers together."""
    return (32 if count == 2 else COLUMN_STEP_BITS) * count // 8


def frame_spans(rows: int, rows_per_frame: int) -> list[tuple[int, int]]:
    """Row ranges of the frames of a matrix."""
    return [(start, min(start + rows_per_frame, rows)) for start in range(0, rows, rows_per_frame)]


def rows_per_frame(columns: int, tile: int) -> int:
    """Rows of a frame: whole tiles, with at least FRAME_SIZE coefficients."""
    return _height(columns, tile, FRAME_SIZE)


def _height(columns: int, tile: int, size: int) -> int:
    return tile * -(-size // (columns * tile))
