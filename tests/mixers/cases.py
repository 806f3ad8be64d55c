"""Small mixers of every row, with random parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.mixers import MIXERS

WIDTH = 16
CAUSAL = [name for name, row in MIXERS.items() if row.is_causal]
BIDIRECTIONAL = [name for name, row in MIXERS.items() if not row.is_causal]
_KERNEL = {"kernel_length": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "causal_fnet": _KERNEL,
    "fftnet": {"bins": 9},
    "causal_fftnet": {"chunk": 16, **_KERNEL},
    "spectral_mixing": {"bins": 9},
    "causal_spectral_mixing": _KERNEL,
    "causal_spectral_mlp": _KERNEL,
    "hybrid": {"window": 8},
    "causal_hybrid": {"window": 8, **_KERNEL},
}


def random_mixer(name: str, width: int = WIDTH, settings: dict[str, Any] | None = None) -> nn.Module:
    mixer = MIXERS[name].fresh(width, SETTINGS.get(name) if settings is None else settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
