"""How much the hidden states that a model ends with change with errors in the outputs of its layers.

An error e_t in the output of a layer at token t changes the last hidden states by J_t e_t. With v random, of
independent entries of variance one, and g_t the gradient of v · (last hidden states), the mean of (g_t · e_t)² is
|J_t e_t|² (Hutchinson, 1990). Where the entries of e_t are independent and of equal variance, it is |g_t|² |e_t|² / O.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.live.blocks import Sample, hidden_of
from spectral_surgery.live.hooks import hooked
from spectral_surgery.live.running import called


@dataclass
class SumOfSquares:
    """A running sum of squares, and how many there are."""

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        """Mean square; 0 of none."""
        return self.total / max(self.count, 1)


@contextmanager
def gradient_squares(layers: dict[str, nn.Module]) -> Iterator[dict[str, SumOfSquares]]:
    """Sum the squared gradients with regard to what layers return, in all backward passes while the block lasts."""
    sums: dict[str, SumOfSquares] = {}

    def add(name: str, gradient: Tensor) -> None:
        squares = sums.setdefault(name, SumOfSquares())
        squares.total += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        squares.count += gradient.numel()

    def watch(name: str, _: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, name))

    with hooked(layers, watch):
        yield sums


def pull_back(block: nn.Module, sample: Sample, gradient: Tensor) -> Tensor:
    """The gradient with regard to the hidden states that a block is given."""
    if sample.skipped:
        return gradient
    hidden = sample.hidden().detach().requires_grad_()
    with torch.enable_grad():
        output = hidden_of(called(block, (hidden, *sample.args), sample.named))
    pulled: Tensor = torch.autograd.grad(output, hidden, gradient)[0]
    return pulled


def probe(hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient to start with: random, and so long that errors count relative to the hidden state of their token.

    Models normalise their last hidden states, or return normalised ones.
    """
    length = torch.linalg.vector_norm(hidden.float(), dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    random = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    gradient: Tensor = (random / length).to(hidden.dtype)
    return gradient
