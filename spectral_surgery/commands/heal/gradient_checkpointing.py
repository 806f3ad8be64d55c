"""Training in the kept spectrum without keeping dense weights: the way back computes them once more."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.layers.kept_spectrum import KeptSpectrum
from spectral_surgery.live.hooks import hooked


@dataclass(frozen=True)
class _View:
    """What a tensor saved for the way back shows of a weight, instead of it."""

    kept: KeptSpectrum
    values: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The same numbers: nothing changes between a forward pass and its way back."""
        with torch.no_grad():
            weight: Tensor = self.kept(self.values)
        return weight.as_strided(self.size, self.stride, self.offset)


@contextmanager
def recomputed_weights(model: nn.Module) -> Iterator[None]:
    """While the block lasts, forward passes keep no weight that is computed from a kept spectrum for their way back.

    It costs one more inverse transform a weight and step, and saves as much memory as the dense weights take.
    """
    alive: dict[int, tuple[weakref.ref[Tensor], KeptSpectrum, Tensor]] = {}

    def computed(kept: KeptSpectrum, args: tuple[Any, ...], weight: Tensor) -> None:
        if torch.is_grad_enabled():
            alive[weight.untyped_storage().data_ptr()] = weakref.ref(weight), kept, args[0].detach()

    def pack(saved: Tensor) -> Tensor | _View:
        weight, kept, values = alive.get(saved.untyped_storage().data_ptr(), (None, None, None))
        if weight is None or kept is None or values is None or weight() is None:  # another tensor in the same place
            return saved
        return _View(kept, values, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))

    def unpack(packed: Tensor | _View) -> Tensor:
        return packed.tensor() if isinstance(packed, _View) else packed

    spectra = {module: module for module in model.modules() if isinstance(module, KeptSpectrum)}
    with hooked(spectra, computed), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
