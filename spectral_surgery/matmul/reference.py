"""The definition, dense and slow: what every resident form must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.codec.quantized import QuantizedSpectrum


def spectral_matmul(x: Tensor, spectrum: QuantizedSpectrum) -> Tensor:
    """Y = x Wᵀ, by decompressing W: [..., O] in the dtype of x. ``x`` is [..., I] floating."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.linear(x.to(wide), spectrum.to_dense(wide)).to(x.dtype)
