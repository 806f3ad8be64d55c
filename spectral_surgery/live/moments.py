"""Second moments of what linear layers are given, summed while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.live.hooks import hooked

_NARROW, _STRIPS = 1024, (128, 256)  # columns of a product: of matrices up to that width, and of wider ones


class SecondMoment:
    """H = Xᵀ X of rows that come in batches; of a symmetric matrix little more than a half is computed."""

    def __init__(self, width: int, device: torch.device) -> None:
        """Start at zero. ``width``: I, of a row."""
        self._sum = torch.zeros(width, width, device=device)
        self._strip = _STRIPS[width > _NARROW]

    def add(self, x: Tensor) -> None:
        """Take rows: [..., I], floating; they are multiplied and summed in float32."""
        rows, total = x.detach().reshape(-1, x.shape[-1]).float(), self._sum
        for start in range(0, len(total), self._strip):
            stop = start + self._strip
            total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])

    def whole(self) -> Tensor:
        """The sum so far, [I, I] float32; it changes when more rows are added."""
        total = self._sum
        for start in range(0, len(total), self._strip):
            stop = start + self._strip
            total[stop:, start:stop] = total[start:stop, stop:].T
        return total


def _nothing(name: str, x: Tensor) -> None:
    pass


@contextmanager
def moments_of(
    layers: dict[str, nn.Module], seen: Callable[[str, Tensor], None] = _nothing
) -> Iterator[dict[str, Tensor]]:
    """Sum the second moments of the inputs of layers while the block lasts.

    Args:
        layers: modules that take [..., I], by name. Those that are given the same tensor share one sum.
        seen: called with the name of a layer and its input, once that is summed and before the layer runs.

    Yields:
        H = Xᵀ X, [I, I] float32, by name; filled when the block ends, without layers that did not run.
    """
    moments: dict[str, Tensor] = {}
    sums: dict[str, SecondMoment] = {}
    leaders: dict[str, str] = {}
    last: tuple[Tensor, str] | None = None  # kept alive, since a new tensor may get the id of one that is gone

    def see(name: str, args: tuple[Any, ...], _: object) -> None:
        nonlocal last
        x = cast(Tensor, args[0])
        if name not in leaders:
            leaders[name] = last[1] if last is not None and last[0] is x else name
        if leaders[name] == name:
            if name not in sums:
                sums[name] = SecondMoment(x.shape[-1], x.device)
            sums[name].add(x)
            last = (x, name)
        seen(name, x)

    with hooked(layers, see, before=True):
        yield moments
    whole = {name: total.whole() for name, total in sums.items()}
    moments |= {name: whole[leader] for name, leader in leaders.items()}
