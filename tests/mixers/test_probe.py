"""The probe finds every way in which a mixer can look ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.errors import CausalityError
from spectral_surgery.mixers import leak, require_causal


class PaddedFFT(nn.Module):
    """A causal kernel, but one FFT over all of time: only rounding noise leaks."""

    def forward(self, x: Tensor) -> Tensor:
        points = 2 * x.shape[1]
        kernel = torch.fft.rfft(torch.linspace(1, 0, x.shape[1]), n=points)
        return torch.fft.irfft(torch.fft.rfft(x, n=points, dim=1) * kernel[:, None], n=points, dim=1)[:, : x.shape[1]]


class PooledGate(nn.Module):
    """Zero weights at the start hide that the gate sees all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean(1, keepdim=True))


class NotANumber(nn.Module):
    """Outputs that cannot be compared."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


class Constant(nn.Module):
    """Outputs that tell nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@pytest.mark.parametrize(
    "module", [PaddedFFT(), PooledGate(), NotANumber(), Constant()], ids=lambda m: type(m).__name__
)
def test_leaks_are_found(module: nn.Module) -> None:
    with pytest.raises(CausalityError, match=r"mine: expected that later tokens.*got changes of .* in"):
        require_causal(module, 8, "mine")


def test_what_is_causal_passes_and_is_not_changed() -> None:
    module = nn.Linear(8, 8)
    before = module.weight.clone()
    require_causal(module, 8, "linear")
    assert leak(module, 8).before == 0
    assert torch.equal(module.weight, before)
    assert 0 < leak(PaddedFFT(), 8).before < 10
