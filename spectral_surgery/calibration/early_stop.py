"""Ending the run of a block where nothing more is wanted: what comes after the last layer is not computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor

from spectral_surgery.live.blocks import Reached


class EarlyStop:
    """Ends runs of a block at the last layer that is wanted, as known from a run to the end on a batch of that shape.

    It never ends one where some layer did not run in that run: routers may choose others for the next batch.
    """

    def __init__(self, layers: Collection[str]) -> None:
        """Know nothing yet; the first batch of each shape is run to its end.

        Args:
            layers: names of all that are wanted.
        """
        self._layers = frozenset(layers)
        self._shape = torch.Size()
        self._calls: Counter[str] = Counter()
        self._known: dict[torch.Size, Counter[str]] = {}

    def seen(self, name: str, x: Tensor) -> None:
        """Count a call of a layer with its input, before it computes anything.

        Raises:
            Reached: when it is the last one.
        """
        if not self._calls:
            self._shape = x.shape
        self._calls[name] += 1
        if self._calls == self._known.get(self._shape):
            self._calls = Counter()
            raise Reached

    def finished(self) -> None:
        """Learn from a run that came to its end."""
        if self._calls.keys() == self._layers:
            self._known[self._shape] = self._calls
        self._calls = Counter()
