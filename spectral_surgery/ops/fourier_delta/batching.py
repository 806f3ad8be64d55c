"""vmap of operators that take leading dimensions themselves, or none at all: one call after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def register_loop(operator: Any) -> None:
    """Give an operator a vmap rule.

    Args:
        operator: made by torch.library.custom_op, with tensors as results.
    """
    torch.library.register_vmap(operator, loop(operator))


def loop(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule.

    Args:
        operator: as in `register_loop`.

    Returns:
        (info, dimensions that are mapped, arguments) to (results, their dimensions).
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [operator(*each) for each in _each(info.batch_size, in_dims, arguments)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        parts = tuple(torch.stack(part) for part in zip(*results, strict=True))
        return parts, (0,) * len(parts)

    return rule


def _each(size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    for index in range(size):
        pairs = zip(arguments, in_dims, strict=True)
        yield tuple(value if dim is None else value.select(dim, index) for value, dim in pairs)
