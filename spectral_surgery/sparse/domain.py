"""Where a sparse spectrum lives: its transform, tiles and axes, and the half-plane of rfft2.

A tensor is seen as a matrix [O, I]: a vector as one row, more than two dimensions as
[shape[0], -1]. The transforms of TRANSFORMS are real and give one coefficient per weight. `rfft2`
is the two-dimensional Fourier transform of the whole matrix. Its spectrum is symmetric, so half a
plane [O, F], F = I // 2 + 1, holds all of it. In the columns that are self-conjugate (the
first, and the last for even I), only rows up to O // 2 are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, LimitError, ShapeError
from spectral_surgery.transforms import TRANSFORMS, tiles
from spectral_surgery.transforms.base import Transform, as_real

RFFT2 = "rfft2"
MAX_AXIS = 8192  # the matrix of a whole-axis transform is [n, n]
MAX_NUMEL = 1 << 34

TileMap = Callable[[Tensor, Transform, int, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Domain:
    """Transform, tiles and axes of the spectrum of a tensor; equal domains can be added.

    Attributes:
        tile: Points in a tile, P; None for whole axes.
        axes: Transformed axes of the matrix, 0 for O and 1 for I.
    """

    shape: tuple[int, ...]
    tile: int | None
    transform: str
    axes: tuple[int, ...]

    @property
    def half_plane(self) -> bool:
        """Whether the spectrum is complex, half of a symmetric plane."""
        return self.transform == RFFT2

    @property
    def numel(self) -> int:
        """Number of weights, and of real degrees of freedom of the spectrum."""
        return prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows = 1 if len(self.shape) == 1 else self.shape[0]
        return rows, self.numel // rows

    @property
    def spectrum_shape(self) -> tuple[int, int]:
        """Shape that positions count in, row by row: (O, I), or (O, F) for rfft2."""
        rows, columns = self.matrix_shape
        return rows, columns // 2 + 1 if self.half_plane else columns

    def check(self) -> None:
        """Refuse a domain that no spectrum can have.

        Raises:
            ShapeError: If the shape is empty.
            ConfigError: If transform, tile or axes are not accepted.
            LimitError: If the tensor or a whole-axis transform would be too large.
        """
        if not self.shape or min(self.shape) < 1:
            raise ShapeError(f"spectrum: expected at least one dimension, each of 1 or more, got shape {self.shape}.")
        if self.numel > MAX_NUMEL:
            raise LimitError(
                f"spectrum: expected at most {MAX_NUMEL} weights, got {self.numel} of shape {self.shape}. Split the"
                " tensor."
            )
        self._check_axes()
        if not self.half_plane:
            self._check_tile(TRANSFORMS[self.transform])

    def forward(self, x: Tensor) -> Tensor:
        """Transform a tensor of `shape` into its spectrum, float32 (complex64 for rfft2)."""
        matrix = as_real(x).reshape(self.matrix_shape)
        if self.half_plane:
            spectrum: Tensor = torch.fft.rfft2(matrix, norm="ortho")  # [O, F]
            return spectrum
        return self._tiled(tiles.forward, matrix, self.axes)

    def inverse(self, spectrum: Tensor) -> Tensor:
        """Undo `forward`; of mirrored coefficients of a half-plane only one is read."""
        if not self.half_plane:
            return self._tiled(tiles.inverse, spectrum, self.axes).reshape(self.shape)
        whole = self._mirrored(spectrum)
        dense: Tensor = torch.fft.irfft2(whole, s=self.matrix_shape, norm="ortho")
        return dense.reshape(self.shape)

    def freedom(self, positions: Tensor) -> Tensor:
        """Return the real degrees of freedom at positions of the spectrum, [K] int64.

        One for a real transform. For rfft2, two stand for a conjugate pair, one for a coefficient
        that is self-conjugate, none for one whose conjugate is stored in another row.
        """
        if not self.half_plane:
            return torch.ones_like(positions, dtype=torch.int64)
        rows, columns = self.matrix_shape
        row = positions // self.spectrum_shape[1]
        column = positions % self.spectrum_shape[1]
        edge = (column == 0) | (2 * column == columns)
        alone = edge & ((row == 0) | (2 * row == rows))
        mirrored = edge & (2 * row > rows)
        return 2 - alone.long() - 2 * mirrored.long()

    def from_input(self, x: Tensor) -> Tensor:
        """Transform activations so that the spectrum can multiply them: [N, I] to [N, I or F]."""
        if self.half_plane:
            half: Tensor = torch.fft.rfft(x, norm="ortho")
            return half.conj()
        return self._tiled(tiles.forward, x, (1,)) if 1 in self.axes else x

    def to_output(self, y: Tensor) -> Tensor:
        """Bring products with the spectrum back to space: [N, O] to [N, O], real."""
        if self.half_plane:
            whole: Tensor = torch.fft.ifft(y, norm="ortho")
            return whole.real
        return self._tiled(tiles.inverse, y, (1,)) if 0 in self.axes else y

    def _tiled(self, along: TileMap, matrix: Tensor, axes: tuple[int, ...]) -> Tensor:
        for axis in axes:
            tile = self.tile or matrix.shape[axis]
            matrix = along(matrix, TRANSFORMS[self.transform], tile, (axis,))
        return matrix

    def _mirrored(self, spectrum: Tensor) -> Tensor:
        rows, columns = self.matrix_shape
        edges = [0, columns // 2] if columns % 2 == 0 else [0]
        whole = spectrum.clone()
        half = self.freedom(torch.arange(spectrum.numel(), device=spectrum.device)) / 2
        edge = (spectrum * half.reshape(spectrum.shape))[:, edges]
        mirror = -torch.arange(rows, device=spectrum.device) % rows
        whole[:, edges] = edge + edge[mirror].conj()
        return whole

    def _check_axes(self) -> None:
        allowed = [(0, 1)] if self.half_plane else [(0,), (1,), (0, 1)]
        if self.axes not in allowed:
            raise ConfigError(
                f"spectrum: expected axes {' or '.join(map(str, allowed))} for {self.transform}, got {self.axes}. "
                "Use axes=(0, 1)."
            )

    def _check_tile(self, transform: Transform) -> None:
        if self.tile is not None and self.tile < 1:
            raise ConfigError(
                f"spectrum: expected a tile of 1 or more, or None for whole axes, got {self.tile}. Use tile=128."
            )
        for axis in self.axes:
            length = self.matrix_shape[axis]
            if min(self.tile or length, length) > MAX_AXIS:
                raise LimitError(
                    f"spectrum: expected a tile of at most {MAX_AXIS}, got {self.tile or length} on an axis of"
                    f" {length}. Use tile=128."
                )
            transform.require(self.tile or length, "tile")
