"""vmap of functions that take no further leading dimension: one call after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loop(
    function: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Call a function for every index and stack the results.

    Returns results, and which of their dimensions is mapped: the first.

    Args:
        in_dims: which dimension of each argument is mapped, or None.
    """
    results = []
    for index in range(size):
        pairs = zip(arguments, in_dims, strict=True)
        results.append(function(*(value if dim is None else value.select(dim, index) for value, dim in pairs)))
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    parts = tuple(torch.stack(part) for part in zip(*results, strict=True))
    return parts, (0,) * len(parts)
