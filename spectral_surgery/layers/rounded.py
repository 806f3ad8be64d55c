"""A bias or a norm's scale that is trained as it will be stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_UNIT = 0.2  # of the root mean square: such vectors want smaller steps than coefficients of matrices


class Rounded(nn.Module):
    """A parametrization (torch.nn.utils.parametrize): values [N] to a vector [N] of numbers that a dtype has.

    The gradient goes to the values as if nothing had been rounded (straight-through). Values count in a part of the
    vector's root mean square, so that one learning rate does for all.
    """

    def __init__(self, vector: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        rms = float(vector.detach().float().square().mean().sqrt())
        self._unit, self._dtype = _UNIT * (rms if rms > 0 else 1.0), dtype

    def forward(self, values: Tensor) -> Tensor:
        """[N] to the vector, in the dtype of the values."""
        exact = values * self._unit
        return exact + (exact.detach().to(self._dtype).to(exact.dtype) - exact.detach())

    def right_inverse(self, vector: Tensor) -> Tensor:
        """The values of a vector."""
        return vector / self._unit

    def stored(self, values: Tensor) -> Tensor:
        """[N] in the dtype that it is stored in."""
        return (values.detach() * self._unit).to(self._dtype)
