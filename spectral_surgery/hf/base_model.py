"""What is known of the model of a checkpoint without its weights: where parameters are stored, which are tied."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.errors import BackendError, CheckpointError
from spectral_surgery.files.compressed.plan import find_tied
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.hf.models import outline_model
from spectral_surgery.hf.tensor_names import StoredParameter, TensorNames, as_stored, names_in
from spectral_surgery.live.skeleton import is_named_conv1d

_HEAD = re.compile(r"(lm_head|embed_out|output\w*|decoder)\.weight$")


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint, and the modules that transformers would make of it.

    Attributes:
        model: without weights; None where transformers is absent or does not know it.
        names: where parameters are stored.
        ties: root by name of a parameter that is the same as another one, whether it is stored or not.
    """

    index: CheckpointIndex
    model: Any
    names: TensorNames
    ties: dict[str, str]

    @cached_property
    def stored(self) -> dict[str, StoredParameter]:
        """Everything that is stored, once: parameters and buffers under their names in the model, others as stored."""
        known = {name: parameter for name, parameter in self.names.parameters.items() if parameter.name == name}
        used = {piece.info.name for parameter in known.values() for piece in parameter.pieces}
        others = {name: as_stored(name, info) for name, info in self.index.tensors.items() if name not in used}
        return dict(sorted({**others, **known}.items()))

    @cached_property
    def equal(self) -> dict[str, str]:
        """Second name -> first name of what is stored twice, with equal bytes."""
        names = {parameter.whole.name: name for name, parameter in self.stored.items() if parameter.whole is not None}
        pairs = find_tied(self.index).items()
        return {names[alias]: names[name] for alias, name in pairs if alias in names and name in names}

    def find(self, name: str) -> StoredParameter | None:
        """Where a parameter is stored: tied ones where their root is."""
        parameter = self.names.find(name)
        root = self.ties.get(name) or (self.ties.get(parameter.name) if parameter else None)
        return self.names.find(root) if root else parameter

    def named(self, name: str) -> str:
        """A parameter as the model calls it, where an adapter knew the model with a head more or less."""
        parameter = self.names.find(name)
        return parameter.name if parameter and name not in (*self.ties, *self.ties.values()) else name

    def tied_with(self, name: str) -> tuple[str, ...]:
        """All names of a parameter that is tied, the root first; none when it is not."""
        parameter = self.named(name)
        root = self.ties.get(parameter, parameter)
        others = [alias for alias, other in self.ties.items() if other == root]
        return (root, *others) if others else ()

    def is_stored(self, name: str) -> bool:
        """Whether a tied parameter is stored as a tensor too."""
        parameter, root = self.names.find(name), self.ties.get(name, name)
        other = self.names.find(root)
        return parameter is not None and (
            name == root or other is None or parameter.pieces[0].info != other.pieces[0].info
        )

    @property
    def hides_ties(self) -> bool:
        """Whether embeddings are tied to an output layer that is not stored, and whose name nobody knows."""
        heads = [name for name in self.index.tensors if _HEAD.search(name)]
        return self.model is None and not heads and not self.ties and _says_tied(self.index.config)

    def module(self, name: str) -> nn.Module | None:
        """The module of an adapter's layer; None when it is not known."""
        for spelling in self._spellings(name) if self.model is not None else ():
            try:
                module: nn.Module = self.model.get_submodule(spelling)
            except AttributeError:
                continue
            return module
        return None

    def is_transposed(self, state: AdapterState, layer: str, shape: Sequence[int]) -> bool:
        """Whether a matrix is stored as [I, O]: the module tells, else factors, names or the adapter's setting."""
        if len(shape) != 2 or layer in state.embeddings:
            return False
        module = self.module(layer)
        if module is not None:
            return is_conv1d(module)
        factors = state.layers[layer]
        low_rank = "A" in factors and "B" in factors and factors["A"].dim() == factors["B"].dim() == 2
        product = (factors["B"].shape[0], factors["A"].shape[1]) if low_rank else ()
        if product and product[0] != product[1] and tuple(shape) in (product, product[::-1]):
            return tuple(shape) != product
        known = [name for name in state.layers if is_named_conv1d(name, self.index.config.get("model_type"))]
        return layer in known if known else state.spec.targets.fan_in_fan_out

    def _spellings(self, name: str) -> Iterator[str]:
        yield name
        yield f"{self.model.base_model_prefix}.{name}"
        yield name.partition(".")[2]


def _says_tied(config: Mapping[str, object]) -> bool:
    return any(
        _says_tied(value) if isinstance(value, dict) else key == "tie_word_embeddings" and value is True
        for key, value in config.items()
    )


def base_model(index: CheckpointIndex) -> BaseModel:
    """Ask transformers about a checkpoint; without it, names are what the files say."""
    model: Any = None
    if index.config.get("architectures"):
        try:
            model = outline_model(index.root)
        except (BackendError, CheckpointError):
            model = None
    names = TensorNames(index) if model is None else names_in(model, index)
    if not names.parameters:
        model = None  # the files hold another model than the configuration describes
    return BaseModel(index, model, names, _ties(index, model, names))


def _ties(index: CheckpointIndex, model: Any, names: TensorNames) -> dict[str, str]:
    same = find_tied(index) if index.config.get("tie_word_embeddings") is not False else {}
    if model is None:
        return same
    ties: dict[str, str] = {}
    for alias, name in model.all_tied_weights_keys.items():
        tensor, root = names.find(alias), names.find(name)
        if tensor is None or root is None:
            continue
        first, second = tensor.pieces[0].info.name, root.pieces[0].info.name
        if first == second or same.get(first) == second or same.get(second) == first:
            ties[alias] = name
    return ties
