"""The matrices of many experts, a spectrum each: an expert that no token goes to costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spectral_surgery.errors import ShapeError
from spectral_surgery.layers.linear import autocast_input
from spectral_surgery.layers.weight import SpectralWeight
from spectral_surgery.matmul import expert_products, recorded


class SpectralExperts(nn.Module):
    """Stands for a fused parameter [E, O, I] of E experts; or [E, I, O], where they are stored transposed.

    ``transposed``: whether an expert multiplies by its matrix and not by the transposed one.
    """

    def __init__(self, weights: Iterable[SpectralWeight], *, transposed: bool = False) -> None:
        """Hold matrices.

        Args:
            weights: of each expert, all of one shape.

        Raises:
            ShapeError: when there is none, or shapes differ.
        """
        super().__init__()
        self.transposed = transposed
        self.experts = nn.ModuleList(weights)
        shapes = sorted({weight.shape for weight in self.weights})
        if len(shapes) != 1:
            raise ShapeError(f"experts: expected one or more of one shape, got {len(self.experts)} of shapes {shapes}.")

    @property
    def weights(self) -> list[SpectralWeight]:
        """The matrix of each expert."""
        return [cast(SpectralWeight, weight) for weight in self.experts]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the fused parameter: (E, O, I) or (E, I, O)."""
        return (len(self.experts), *cast(SpectralWeight, self.experts[0]).shape)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type that the matrices count as."""
        return cast(SpectralWeight, self.experts[0]).dtype

    @property
    def nbytes(self) -> int:
        """Resident bytes of all experts."""
        return sum(weight.nbytes for weight in self.weights)

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Multiply each row by the matrix of its expert.

        One expert after the other; on a GPU up to 16 rows of each in one launch, unless a gradient is wanted.

        Returns [S, O] in the dtype of x (under autocast: in the autocast dtype).

        Args:
            x: [S, I] floating, the rows of the first expert first.
            counts: rows of each expert.

        Raises:
            ShapeError: when the counts are not one for each expert, or do not add up to S.
        """
        return recorded.left_to_python(self._products, x, counts)  # the counts are numbers, which no graph has

    def _products(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if len(counts) != len(self.experts) or sum(counts) != len(x):
            raise ShapeError(
                f"experts: expected {len(self.experts)} counts that add up to {len(x)} rows, got {len(counts)} that"
                f" add up to {sum(counts)}."
            )
        x = autocast_input(x)
        together = None if self.transposed else expert_products(x, [weight.forms for weight in self.weights], counts)
        if together is not None:
            return together
        parts = [
            weight.matmul_transposed(rows) if self.transposed else weight.matmul(rows)
            for weight, rows in zip(self.weights, torch.split(x, list(counts)), strict=True)
            if len(rows)
        ]
        return torch.cat(parts) if parts else x.new_empty((0, self.shape[2 if self.transposed else 1]))

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The fused parameter, decoded expert by expert; None for its `dtype`."""
        device = self.weights[0].forms[0].scale.device
        dense = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        for matrix, weight in zip(dense, self.weights, strict=True):
            matrix.copy_(weight.to_dense(torch.float32))
        return dense

    def extra_repr(self) -> str:
        """Sizes."""
        count, rows, columns = self.shape
        return f"{count} experts of {rows} x {columns}, transposed={self.transposed}"
