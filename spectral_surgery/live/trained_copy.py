"""The copy of a module that is trained whole beside an adapter: a spectrum has no parameters, so it becomes dense."""

from __future__ import annotations

import copy
import warnings
from typing import Protocol, cast

from torch import nn

from spectral_surgery.errors import ConfigError
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear


class HoldsSpectra(Protocol):
    """A module of a model of transformers of which weights are spectra; `hf.quantizer` has the classes."""

    def become_dense(self, done: dict[int, nn.Parameter]) -> None:
        """Decode the spectra, in place."""
        ...


def trained_copy(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights are parameters; a warning says so where they were spectra."""
    twin = copy.deepcopy(module)
    done: dict[int, nn.Parameter] = {}
    decoded = decode(twin, done)
    plain = [(name, part) for name, part in twin.named_modules(remove_duplicate=False) if _is_spectral(part)]
    for name, part in plain:
        dense = _dense(part, done)
        if not name:
            twin = dense
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, dense)
    if decoded or plain:
        weights = sum(parameter.numel() for parameter in twin.parameters())
        warnings.warn(
            f"modules_to_save: a module ({type(twin).__name__}, {weights:,} weights) is compressed; the copy of it"
            " that is trained is dense, in memory and in the files of the adapter.",
            stacklevel=2,
        )
    return twin


def holds_spectra(module: nn.Module) -> bool:
    """Whether weights in a module are spectra."""
    return any(hasattr(type(part), "become_dense") or _is_spectral(part) for part in module.modules())


def decode(module: nn.Module, done: dict[int, nn.Parameter]) -> int:
    """Decode all that `HoldsSpectra` in a module, in place: how many."""
    holders = [part for part in module.modules() if hasattr(type(part), "become_dense")]
    for part in holders:
        cast(HoldsSpectra, part).become_dense(done)
    return len(holders)


def _is_spectral(module: nn.Module) -> bool:
    return isinstance(module, (SpectralConv1D, SpectralEmbedding, SpectralLinear))


def _dense(layer: nn.Module, done: dict[int, nn.Parameter]) -> nn.Module:
    if not isinstance(layer, SpectralEmbedding | SpectralLinear):
        raise ConfigError(
            "modules_to_save: expected Linear or Embedding layers to train whole, got a Conv1D that was compressed in"
            " memory. Compress the model without it."
        )
    dense = layer.to_dense().train(layer.training)
    dense.weight = done.setdefault(id(layer.spectrum), cast(nn.Parameter, dense.weight))
    return dense
