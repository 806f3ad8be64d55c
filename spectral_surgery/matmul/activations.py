"""Activations into the spectral domain and back, so that the weight can stay there.

With orthonormal tile-diagonal transforms, W = T_outᵀ C T_in and y = W x = T_outᵀ (C (T_in x)): tiles of x and of the
product are transformed, a small matrix product per token, and the spectrum C multiplies as it is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.parallel import one_torch_thread
from spectral_surgery.transforms import IDENTITY, TRANSFORMS
from spectral_surgery.transforms.base import constants

_ONE_THREAD = 1 << 23  # multiplications; waking a second thread for fewer costs more than it does


def to_spectrum(x: Tensor, basis: Basis, axis: int = 1) -> Tensor:
    """T x, in the dtype of x (16-bit products accumulate in float32), along the tokens' [T, O] (axis 0) or [T, I]."""
    return _along(x, basis, axis, inverse=False)


def to_space(y: Tensor, basis: Basis, axis: int = 0) -> Tensor:
    """Tᵀ y, the inverse."""
    return _along(y, basis, axis, inverse=True)


def _along(x: Tensor, basis: Basis, axis: int, *, inverse: bool) -> Tensor:
    length = x.shape[1]
    rest = length % basis.tile
    if axis not in basis.axes or basis.transform == IDENTITY.name:
        return x
    if not rest:
        return _tiles(x, basis.transform, basis.tile, inverse)
    parts = [_tiles(x[:, : length - rest], basis.transform, basis.tile, inverse)] if length > rest else []
    last = x[:, length - rest :]
    parts.append(_tiles(last, basis.transform, rest, inverse) if TRANSFORMS[basis.transform].accepts(rest) else last)
    return torch.cat(parts, 1)


def _tiles(x: Tensor, transform: str, points: int, inverse: bool) -> Tensor:
    matrix = transform_matrix(transform, points, x.dtype, x.device, inverse)
    if x.numel() * points < _ONE_THREAD:
        with one_torch_thread():
            return (x.reshape(-1, points) @ matrix).reshape(x.shape)
    return (x.reshape(-1, points) @ matrix).reshape(x.shape)


@lru_cache(maxsize=64)
def transform_matrix(transform: str, points: int, dtype: torch.dtype, device: torch.device, inverse: bool) -> Tensor:
    """What rows of tiles are multiplied by; one look-up, since it takes longer than the product of a single row."""
    with constants():
        matrix = TRANSFORMS[transform].basis(points, dtype=dtype, device=device)
        return matrix if inverse else matrix.T
