"""Our layers as kinds of the layers they stand for, so that transformers and PEFT take them.

PEFT puts its adapters on instances of nn.Linear, nn.Embedding and transformers' Conv1D; transformers asks weights for
their shape and dtype. A stand-in is one of them, with a weight that costs nothing until someone computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spectral_surgery.errors import NotMergeableError
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear


class LazyWeight(Tensor):
    """A weight that is decompressed anew by everything that computes with it, and by ``.data``.

    Setting its data raises NotMergeableError: adapters that are merged so would be lost without a word.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch says to
    _is_hf_initialized = True  # transformers leaves it alone
    decode: Callable[[], Tensor]

    @staticmethod
    def of(decode: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> LazyWeight:
        """Make one.

        Args:
            decode: gives the dense weight.
            shape: its shape.
            like: a tensor of its dtype and device.
        """
        made = Tensor._make_wrapper_subclass(LazyWeight, tuple(shape), dtype=like.dtype, device=like.device)
        made.decode = decode
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute with the dense weight."""
        del types
        dense = tree_map_only(LazyWeight, lambda weight: weight.decode(), (args, dict(kwargs or {})))
        return func(*dense[0], **dense[1])

    @property
    def data(self) -> Tensor:
        """The dense weight."""
        return self.decode()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Refused."""
        del value
        raise NotMergeableError(
            "weight: of a compressed layer, cannot be written; adapters beside it are accepted. Decompress the model"
            " before you merge into it: model.dequantize(), or `spectral-surgery decompress`."
        )


class LinearStandIn(SpectralLinear, nn.Linear):  # type: ignore[misc]  # torch declares that a bias is never None
    """A SpectralLinear that is an nn.Linear."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[O, I], decompressed by what computes with it."""
        return LazyWeight.of(self.spectrum.to_dense, self.spectrum.shape, self.spectrum._like)


class EmbeddingStandIn(SpectralEmbedding, nn.Embedding):
    """A SpectralEmbedding that is an nn.Embedding."""

    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table, decompressed by what computes with it."""
        return LazyWeight.of(self.spectrum.to_dense, self.spectrum.shape, self.spectrum._like)


class _Conv1D(SpectralConv1D):
    @property
    def weight(self) -> Tensor:
        """[I, O], decompressed by what computes with it."""
        return LazyWeight.of(self._dense, (self.nx, self.nf), self.spectrum._like)

    def _dense(self) -> Tensor:
        return super().weight


@cache
def conv1d_stand_in() -> type[SpectralConv1D]:
    """A SpectralConv1D that is a Conv1D of transformers, with its name, by which it is known to be transposed."""
    from transformers.pytorch_utils import Conv1D

    return type("Conv1D", (_Conv1D, Conv1D), {"__module__": __name__})


def stand_in(layer: nn.Module) -> nn.Module:
    """Make a layer of ours an instance of what it stands for.

    Args:
        layer: changed in place; its constructor has run, and that of the other class must not.
    """
    if isinstance(layer, SpectralLinear):
        layer.__class__ = LinearStandIn
    elif isinstance(layer, SpectralEmbedding):
        layer.__class__ = EmbeddingStandIn
    elif isinstance(layer, SpectralConv1D):
        layer.__class__ = conv1d_stand_in()
    return layer
