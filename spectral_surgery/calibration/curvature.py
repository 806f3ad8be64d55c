"""The curvature of a loss along the coefficients of weights, from gradients of random projections of the outputs.

With v random, of independent entries of variance one, and outputs scaled so that the loss is their squared change, the
mean square of the gradient of v · outputs is the diagonal of the Gauss-Newton matrix (Hutchinson, 1990).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.importance import Importance
from spectral_surgery.live.running import differentiating


def importance_of(
    weights: Mapping[str, tuple[nn.Parameter, Basis]], projections: Iterable[Callable[[], Tensor]]
) -> dict[str, Importance]:
    """How much the coefficients of weights count, by name; of those that a gradient reached."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0
    for count, projection in enumerate(projections, 1):  # noqa: B007 - used after the loop
        scalar = projection()
        with differentiating(scalar):
            gradients = torch.autograd.grad(scalar, [weight for weight, _ in weights.values()], allow_unused=True)
        for (name, (_, basis)), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is not None:
                squares = basis.forward(gradient).square_()
                rows, columns = sums.get(name, (0.0, 0.0))
                sums[name] = rows + squares.mean(1), columns + squares.mean(0)
    means = {name: (rows / count, columns / count) for name, (rows, columns) in sums.items() if rows.any()}
    return {name: Importance.of_squares(*squares) for name, squares in means.items()}
