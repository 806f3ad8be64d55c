"""What a resident form of a spectrum can do; the operator and the layers need no more."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis


class Form(Protocol):
    """The spectrum of an [O, I] matrix W in memory: levels (int8 where they fit) times scales of columns and rows.

    Implementations are frozen dataclasses: their tensors become buffers of a layer, the rest says how to read them.

    Attributes:
        scale: [1] or [I] float32.
        row_scale: [0] or [O] float32.
        shape: (O, I).
        basis: transform, tile and axes.
    """

    @property
    def scale(self) -> Tensor:
        """[1] or [I] float32: a coefficient is its level times this, and times ``row_scale``."""
        ...

    @property
    def row_scale(self) -> Tensor:
        """[O] float32; [0] for ones, where all rows have one scale."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        ...

    @property
    def basis(self) -> Basis:
        """Transform, tile and axes."""
        ...

    def product(self, x: Tensor, accuracy: torch.dtype, *, transposed: bool = False) -> Tensor:
        """Multiply scaled activations by the levels: [T, I] to [T, O]; by their transpose: [T, O] to [T, I]."""
        ...

    def levels(self, rows: Tensor) -> Tensor:
        """Levels of some rows: [n] int64 to [n, I] int8 or float32."""
        ...

    def recorded_levels(self) -> Tensor:
        """All levels, [O, I] int8 or float32, by operations that can be recorded, whatever their numbers are.

        Raises ConfigError when there are no such operations.
        """
        ...


def scaled(values: Tensor, form: Form, axis: int) -> Tensor:
    """What rows (axis 0) or columns (1) of a matrix gave, or are given, [..., O] or [..., I], times their scales."""
    if axis:
        return values * form.scale.to(values.dtype)
    return values * form.row_scale.to(values.dtype) if form.row_scale.nbytes else values  # a trace warns of other sizes


def coefficients(form: Form, rows: Tensor) -> Tensor:
    """Rows of the spectrum itself: [n] int64 to [n, I] float32."""
    values = form.levels(rows) * form.scale
    return values * form.row_scale[rows].unsqueeze(1) if len(form.row_scale) else values
