"""What a resident form of a spectrum can do; the operator and the layers need no more."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis


class Form(Protocol):
    """The spectrum of an [O, I] matrix W in memory: levels (int8 where they fit) times a scale per matrix or column.

    Implementations are frozen dataclasses: their tensors become buffers of a layer, the rest says how to read them.

    Attributes:
        scale: [1] or [I] float32.
        shape: (O, I).
        basis: transform, tile and axes.
    """

    @property
    def scale(self) -> Tensor:
        """[1] or [I] float32: a coefficient is its level times this."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        ...

    @property
    def basis(self) -> Basis:
        """Transform, tile and axes."""
        ...

    def product(self, x: Tensor, accuracy: torch.dtype) -> Tensor:
        """Multiply scaled activations by the levels: [T, I] to [T, O]; see `integer.multiply`."""
        ...

    def adjoint(self, g: Tensor, accuracy: torch.dtype) -> Tensor:
        """Multiply by the transposed levels: [T, O] to [T, I]."""
        ...

    def levels(self, rows: Tensor) -> Tensor:
        """Levels of some rows: [n] int64 to [n, I] int8 or float32."""
        ...

    def recorded_levels(self) -> Tensor:
        """All levels, [O, I] int8, by operations that can be recorded, whatever their numbers are.

        Raises ConfigError when there are no such operations.
        """
        ...
