"""Tile-diagonal transforms: an axis is cut into tiles, and each tile is transformed alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.transforms.base import Dim, Transform, as_real

Along = Callable[[Tensor, Dim], Tensor]


def spans(n: int, tile: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of each tile of an axis: n // tile full ones and the remainder.

    Raises ConfigError if `tile` is less than 1.
    """
    _require_positive(tile)
    return [(start, min(start + tile, n)) for start in range(0, n, tile)]


def forward(x: Tensor, transform: Transform, tile: int, axes: tuple[int, ...]) -> Tensor:
    """Transform each tile along the chosen matrix axes, [..., O, I] -> [..., O, I].

    The shorter remainder of an axis is transformed at its length, or left as it is where the
    transform refuses that length. Dtypes as in `Transform.forward`.

    Args:
        x: [..., O, I], real.
        axes: Subset of (0, 1): 0 = rows O, 1 = columns I.

    Raises:
        ConfigError: If `tile` is less than 1 or refused by the transform, or an axis is unknown.
        DomainError: If `x` is complex.
        ShapeError: If `x` has fewer than two dimensions.
    """
    return _apply(x, transform, transform.forward, tile, axes)


def inverse(x: Tensor, transform: Transform, tile: int, axes: tuple[int, ...]) -> Tensor:
    """Undo `forward`, [..., O, I] -> [..., O, I], with the same dtypes and errors."""
    return _apply(x, transform, transform.inverse, tile, axes)


def _apply(x: Tensor, transform: Transform, along: Along, tile: int, axes: tuple[int, ...]) -> Tensor:
    _require_positive(tile)
    transform.require(tile, "tile")
    if x.ndim < 2:
        raise ShapeError(
            f"{transform.name}: expected shape [..., O, I], got {tuple(x.shape)}. Reshape a vector to (1, n)."
        )
    if not set(axes) <= {0, 1}:
        raise ConfigError(
            f"{transform.name}: expected axes among (0, 1), got {axes}. Use 0 for rows and 1 for columns."
        )
    x = as_real(x)
    if 1 in axes:
        x = _one_axis(x, transform, along, tile, -1)
    if 0 in axes:
        x = _one_axis(x, transform, along, tile, -2)
    return x


def _one_axis(x: Tensor, transform: Transform, along: Along, tile: int, dim: Dim) -> Tensor:
    count, rest = divmod(x.shape[dim], tile)
    parts = []
    if count:
        full = x.narrow(dim, 0, count * tile)
        tiles = torch.unflatten(full, dim, (count, tile))  # [..., O, n, P] or [..., n, P, I]
        parts.append(along(tiles, dim).flatten(dim - 1, dim))
    if rest:
        remainder = x.narrow(dim, count * tile, rest)
        parts.append(along(remainder, dim) if transform.accepts(rest) else remainder)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim) if parts else x


def _require_positive(tile: int) -> None:
    if tile < 1:
        raise ConfigError(f"tiles: expected a tile of 1 or more, got {tile}. Use 64.")
