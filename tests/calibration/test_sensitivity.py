"""Gradients with regard to what layers return, pulled back through a block; and what they predict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_surgery.calibration.sensitivity import gradient_squares, probe, pull_back
from spectral_surgery.live.blocks import Sample


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + self.second(torch.tanh(self.first(x))),)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().requires_grad_(requires_grad=False)


def test_gradients_are_those_of_autograd(block: Block) -> None:
    x, gradient = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    with gradient_squares({"first": block.first, "second": block.second}) as squares:
        own = pull_back(block, Sample(lambda: x, (), {}), gradient)
    jacobian = torch.func.vjp(lambda y: block(y)[0], x)[1](gradient)[0]
    assert torch.allclose(own, jacobian, atol=1e-6)
    assert squares["second"].mean == pytest.approx(float(gradient.square().mean()), rel=1e-6)
    inner = (gradient @ block.second.weight) * (1 - torch.tanh(block.first(x)).square())
    assert squares["first"].mean == pytest.approx(float(inner.square().mean()), rel=1e-5)
    assert squares["first"].count == 2 * 5 * 9
    assert not block.first._forward_hooks


def test_a_probe_predicts_relative_errors_of_hidden_states() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 50, 16, generator=generator) * torch.linspace(0.1, 9, 40)[:, None, None]
    error = 0.01 * torch.randn(40, 50, 16, generator=generator)
    predicted = (probe(hidden, generator) * error).sum(-1).square().mean()
    relative = (error.norm(dim=-1) / hidden.norm(dim=-1)).square().mean()
    assert float(predicted / relative) == pytest.approx(1.0, abs=0.15)
    assert torch.isfinite(probe(torch.zeros(2, 3), generator)).all()
