"""What a transform is: an orthonormal real matrix for each length it accepts.

The lengths in use are tiles of at most a few hundred points, where one small dense product is
faster than a fast transform, so the matrix is the whole definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.utils._python_dispatch import _disable_current_modes

from spectral_surgery.errors import ConfigError, DomainError, ShapeError

Dim = Literal[-1, -2]


@dataclass(frozen=True)
class Transform:
    """An orthonormal real transform of the last dimension; data, not a hierarchy.

    Attributes:
        matrix: Length n -> [n, n] float64 on the CPU, orthonormal; row k is basis function k.
        accepts: Whether a length is supported.
        lengths: The supported lengths in words, completing "48 is not ...".
    """

    name: str
    matrix: Callable[[int], Tensor]
    accepts: Callable[[int], bool]
    source: str
    lengths: str = "1 or more"

    def basis(self, n: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return the cached [n, n] matrix; row k is basis function k. Do not write into it.

        Raises ConfigError if the transform does not accept the length `n`.
        """
        self.require(n, "length")
        return _basis(self.matrix, n, dtype, torch.device(device))

    def forward(self, x: Tensor, dim: Dim = -1) -> Tensor:
        """Transform one dimension, [..., n] -> [..., n].

        float64 stays float64; every other real dtype is computed and returned in float32, also
        under autocast.

        Args:
            x: Real, with at least one dimension (two for `dim` -2).
            dim: -1, the last, or -2, the one before it: [..., n, I] -> [..., n, I].

        Raises:
            ConfigError: If the transform does not accept the length n.
            DomainError: If `x` is complex.
            ShapeError: If `x` has too few dimensions.
        """
        x, basis = _operands(x, self, dim)
        with _unrounded(x.device.type):
            return x @ basis.T if dim == -1 else basis @ x

    def inverse(self, x: Tensor, dim: Dim = -1) -> Tensor:
        """Undo `forward`, [..., n] -> [..., n], with the same arguments, dtypes and errors."""
        x, basis = _operands(x, self, dim)
        with _unrounded(x.device.type):
            return x @ basis if dim == -1 else basis.T @ x

    def require(self, n: int, what: str) -> None:
        """Refuse a length that the transform does not accept.

        Raises ConfigError if it is refused; the text names an accepted length nearby.
        """
        if self.accepts(n):
            return
        nearby = next((m for m in range(max(n, 1), 2 * n) if self.accepts(m)), 1)
        raise ConfigError(
            f"{self.name}: expected a {what} that is {self.lengths}, got {n}. "
            f"Use a {what} of {nearby}, or a transform for any length such as dct."
        )


def as_real(x: Tensor) -> Tensor:
    """Return `x` in the dtype transforms compute in: float64 unchanged, any other as float32.

    Raises DomainError if `x` is complex.
    """
    if x.is_complex():
        raise DomainError(
            f"transform: expected real tensors, got {x.dtype}. Transform the real and imaginary parts apart."
        )
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def any_length(n: int) -> bool:
    """Accept every length from 1 on."""
    return n >= 1


def power_of_two(n: int) -> bool:
    """Accept 1, 2, 4, 8, ..."""
    return n >= 1 and n & (n - 1) == 0


def _operands(x: Tensor, transform: Transform, dim: Dim) -> tuple[Tensor, Tensor]:
    if x.ndim < -dim:
        raise ShapeError(
            f"{transform.name}: expected at least {-dim} dimensions, got shape {tuple(x.shape)}. Reshape it."
        )
    x = as_real(x)
    return x, transform.basis(x.shape[dim], dtype=x.dtype, device=x.device)


def _unrounded(device_type: str) -> AbstractContextManager[None]:
    # autocast would silently round the product to 16 bits
    if is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def constants() -> Iterator[None]:
    """Make tensors that are kept for everyone, whoever asks first.

    One made in inference mode could not serve a later backward pass, and one made while a graph is recorded might have
    no numbers, or be an operation of that graph.
    """
    tracing = torch._C._get_tracing_state()
    if tracing is not None:  # where nothing is traced, torch may refuse to be told so
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # not in torch's stubs
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if tracing is not None:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]  # the same


@lru_cache(maxsize=64)
def _basis(matrix: Callable[[int], Tensor], n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with constants():
        return matrix(n).to(device=device, dtype=dtype)
