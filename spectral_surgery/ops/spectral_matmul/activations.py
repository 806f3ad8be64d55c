"""Activations into the spectral domain and back, so that the weight can stay there.

With orthonormal tile-diagonal transforms, W = T_outᵀ C T_in and y = W x = T_outᵀ (C (T_in x)): tiles of x and of the
product are transformed, a small matrix product per token, and the spectrum C multiplies as it is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from spectral_surgery.spectra.codec import Basis
from spectral_surgery.spectra.parallel import one_torch_thread
from spectral_surgery.transforms import IDENTITY, TRANSFORMS

_ONE_THREAD = 1 << 23  # multiplications; waking a second thread for fewer costs more than it does


def to_spectrum(x: Tensor, basis: Basis) -> Tensor:
    """T_in x: [T, I] to [T, I], in the dtype of x (16-bit products accumulate in float32)."""
    return _along(x, basis, inverse=False) if 1 in basis.axes else x


def to_space(y: Tensor, basis: Basis) -> Tensor:
    """T_outᵀ y: [T, O] to [T, O], in the dtype of y."""
    return _along(y, basis, inverse=True) if 0 in basis.axes else y


def rows_to_spectrum(x: Tensor, basis: Basis) -> Tensor:
    """T_out x, to multiply by the spectrum from its other side: [T, O] to [T, O]."""
    return _along(x, basis, inverse=False) if 0 in basis.axes else x


def columns_to_space(y: Tensor, basis: Basis) -> Tensor:
    """T_inᵀ y: [T, I] to [T, I]."""
    return _along(y, basis, inverse=True) if 1 in basis.axes else y


def _threads(products: int) -> AbstractContextManager[None]:
    return one_torch_thread() if products < _ONE_THREAD else nullcontext()


def _along(x: Tensor, basis: Basis, *, inverse: bool) -> Tensor:
    transform = TRANSFORMS[basis.transform]
    if transform is IDENTITY:
        return x
    tokens, length = x.shape
    full = length // basis.tile * basis.tile
    parts = []
    for start, stop in ((0, full), (full, length)):
        points = min(basis.tile, stop - start)
        part = x[:, start:stop]
        if points and transform.accepts(points):
            matrix = transform.basis(points, dtype=x.dtype, device=x.device)
            matrix = matrix if inverse else matrix.T
            with _threads(part.numel() * points):
                part = (part.reshape(-1, points) @ matrix).reshape(tokens, stop - start)
        if points:
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
