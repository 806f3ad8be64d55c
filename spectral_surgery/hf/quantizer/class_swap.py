"""Layers of a model whose weight becomes a spectrum where they are, so that transformers and PEFT go on taking them.

PEFT puts its adapters on instances of nn.Linear, nn.Embedding and transformers' Conv1D; transformers asks weights for
their shape and dtype; a head may keep its layers in a list of Python's. So a layer stays the object that it is, with
its bias, buffers, hooks and flags, and changes its class: to ours, or, where it is of a subclass, to one in which ours
stands behind that subclass. What `super().forward` multiplies or looks up is then the spectrum, and what the subclass
adds is added.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight, Rows
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear, SpectralWeight

SpectralLayer = SpectralConv1D | SpectralEmbedding | SpectralLinear


class _StandIn:
    """What all of them have in common."""

    stands_for: ClassVar[type[nn.Module]]
    spectrum: SpectralWeight

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Classes that are made at run time have no name to be found by."""
        return _empty, (self.stands_for,), cast(Any, self).__getstate__()

    def become_dense(self, done: dict[int, nn.Parameter]) -> None:
        """See `live.trained_copy`."""
        key, module = id(self.spectrum), cast(nn.Module, self)
        if key not in done:
            weight = self.spectrum.to_dense()
            turned = isinstance(self, SpectralConv1D) and self.transposed
            done[key] = nn.Parameter((weight.T if turned else weight).contiguous())
        stand_out(module, done[key])

    def _lazy(self, *, turned: bool = False) -> Tensor:
        spectrum: object = self.spectrum
        if isinstance(spectrum, SpectralWeight):
            return LazyWeight.of(Rows.all(spectrum, turned=turned))
        dense: Tensor = self.spectrum.to_dense()  # it is being trained
        return dense.T if turned else dense


class LinearStandIn(_StandIn, SpectralLinear, nn.Linear):  # type: ignore[misc]  # torch declares that a bias is never None
    """A SpectralLinear that is an nn.Linear."""

    stands_for = nn.Linear

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[O, I], decompressed by what does more than multiply by it."""
        return self._lazy()


class EmbeddingStandIn(_StandIn, SpectralEmbedding, nn.Embedding):
    """A SpectralEmbedding that is an nn.Embedding."""

    stands_for = nn.Embedding

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table, decompressed by what does more than look up or multiply."""
        return self._lazy()


class _Conv1D(_StandIn, SpectralConv1D):
    """A SpectralConv1D that becomes a Conv1D of transformers, which is not imported here."""

    @property
    def weight(self) -> Tensor:
        """[I, O], decompressed by what does more than multiply by it."""
        return self._lazy(turned=self.transposed)


@cache
def standing_for(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of layers that stand for those of a class.

    Args:
        cls: nn.Linear, nn.Embedding, Conv1D of transformers, or a subclass of the first two.

    Raises:
        TypeError: when Python cannot put ours behind it.
    """
    if cls is nn.Linear:
        return LinearStandIn
    if cls is nn.Embedding:
        return EmbeddingStandIn
    linear, embedding = issubclass(cls, nn.Linear), issubclass(cls, nn.Embedding)
    bases = (cls, LinearStandIn if linear else EmbeddingStandIn) if linear or embedding else (_Conv1D, cls)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "stands_for": cls})


def stand_in(module: nn.Module, spectrum: SpectralWeight) -> None:
    """Put a spectrum in the place of the weight of a layer.

    Args:
        module: nn.Linear, nn.Embedding without max_norm, Conv1D of transformers, or a subclass of the first two that
            `weight_uses.only_multiplies` accepts; changed in place.
        spectrum: of its weight as checkpoints store it; several layers may share it.
    """
    cls: Any = type(module)
    del module._parameters["weight"]
    if is_conv1d(module):
        layer = SpectralConv1D.from_weight(spectrum)
        for name in ("in_features", "out_features", "transposed"):
            setattr(module, name, getattr(layer, name))
        spectrum = layer.spectrum
    module.spectrum = spectrum
    module.__class__ = standing_for(cls)


def stand_out(module: nn.Module, weight: nn.Parameter) -> None:
    """Give a layer a dense weight again, and its first class. ``module``: a stand-in; changed in place."""
    module.__class__ = cast(Any, module).stands_for
    del module._modules["spectrum"]
    for name in ("in_features", "out_features", "transposed") if is_conv1d(module) else ():
        delattr(module, name)
    module.weight = weight


def _empty(cls: Any) -> nn.Module:
    layer = standing_for(cls)
    return layer.__new__(layer)
