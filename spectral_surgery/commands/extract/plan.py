"""What differs between two checkpoints, and which of it an adapter can carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.from_update.fit_update import Update
from spectral_surgery.adapters.layer import forms_of, is_conv1d, kind_of, shape_of
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import FLOATS
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_config import DIALECTS
from spectral_surgery.files.reader import same_bytes
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.hf.base_model import BaseModel, base_model
from spectral_surgery.hf.tensor_names import StoredParameter
from spectral_surgery.live.choose_targets import candidates
from spectral_surgery.live.skeleton import skeleton
from spectral_surgery.targets import ALL_LINEAR, ModuleTargets

# names of embeddings that models tie to their output layer
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "shared", "embed_in")
_ABSENT = "not in BASE"


@dataclass(frozen=True)
class Pair:
    """A matrix in both checkpoints. ``module``: on the meta device."""

    layer: str
    base: StoredParameter
    tuned: StoredParameter
    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the update."""
        return shape_of(self.module)

    @property
    def transposed(self) -> bool:
        """Whether it is stored as [I, O]."""
        return is_conv1d(self.module)

    def delta(self) -> Tensor:
        """ΔW, [O, I] float32."""
        difference = (self.tuned.read().double() - self.base.read().double()).float()
        return (difference.T if self.transposed else difference).reshape(self.shape).contiguous()

    @property
    def update(self) -> Update:
        """For the fit."""
        return Update(self.layer, self.shape, self.delta)


@dataclass(frozen=True)
class ExtractPlan:
    """Two checkpoints, compared as far as headers and small tensors tell.

    Attributes:
        pairs: matrices that may get an adapter; whether they differ is found when they are read.
        rest: reason by name of tensors that differ and get none.
        transposed: whether most matrices are stored as [I, O]; PEFT looks at each itself.
        kernels: sides of the kernel by convolution.
    """

    base: BaseModel
    tuned: BaseModel
    pairs: tuple[Pair, ...]
    rest: dict[str, str]
    transposed: bool
    embeddings: frozenset[str] = frozenset()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {"layers": {pair.layer: list(pair.shape) for pair in self.pairs}, "rest": self.rest}


def plan_extraction(base: Checkpoint, tuned: Checkpoint, method: str, targets: ModuleTargets) -> ExtractPlan:
    """Match the tensors of two checkpoints by name.

    Args:
        tuned: the same model after fine-tuning; it may have a head more.
        method: name of the row of METHODS; PEFT's FourierFT cannot keep embeddings in its files.
        targets: which modules get an adapter; target_modules None for all that can.

    Raises:
        CheckpointError: when one of them is damaged, quantised or compressed, or they have nothing in common.
        TargetError: when the targets match nothing.
    """
    indices = read_index(base), read_index(tuned)
    for index in indices:
        index.require_plain()
    models = base_model(indices[0]), base_model(indices[1])
    work = _Comparison(*models)
    chosen = work.choose(method, targets)
    rest = work.compare_others(chosen)
    if not chosen and len(rest) == len(work.tuned.stored):
        raise CheckpointError(f"{tuned}: expected a model tuned from {base}, got one without a tensor in common.")
    transposed = sum(pair.transposed for pair in chosen.values()) * 2 > len(chosen)
    forms = forms_of({pair.layer: pair.module for pair in chosen.values()})
    return ExtractPlan(*models, tuple(chosen.values()), rest, transposed, *forms)


@dataclass(frozen=True)
class _Comparison:
    base: BaseModel
    tuned: BaseModel
    why_not: dict[str, str] = field(default_factory=dict)

    def choose(self, method: str, targets: ModuleTargets) -> dict[str, Pair]:
        """Pairs by name of the weight in the tuned model."""
        every = candidates(self._modules(), everything=True)
        modules = {layer: module for layer, module in every if f"{layer}.weight" in self.tuned.stored}
        named = self._named(targets, modules)
        pairs = {}
        for layer, module in modules.items():
            name = f"{layer}.weight"
            info = self.base.names.find(name)
            tuned = self.tuned.stored[name]
            reason = self._why_not(
                layer, module, info, method, asked=layer in named and targets.target_modules is not None
            )
            if layer not in named:
                reason = "not among the targets"
            if reason or info is None:
                self.why_not[name] = reason or _ABSENT
                continue
            pairs[name] = Pair(layer, info, tuned, module)
        return pairs

    def _modules(self) -> nn.Module:
        """Of the tuned model; guessed from names and shapes where transformers does not know it."""
        if self.tuned.model is not None:
            return cast(nn.Module, self.tuned.model)
        kind = self.tuned.index.config.get("model_type")
        shapes = {name: parameter.shape for name, parameter in self.tuned.stored.items()}
        return skeleton(shapes, kind if isinstance(kind, str) else None)

    def compare_others(self, chosen: Iterable[str]) -> dict[str, str]:
        """Reason by name of all that differs beside the chosen ones."""
        rest = {}
        aliases, taken = self.tuned.equal, {*chosen}
        for name, info in self.tuned.stored.items():
            base = self.base.names.find(name)
            if name in taken or (aliases.get(name) in taken and self._tied_in_base(name, aliases[name])):
                continue
            if base is None and aliases.get(name) in self.base.stored:
                continue  # stored twice here, once there
            if base is None:
                rest[name] = _ABSENT
            elif base.shape != info.shape:
                rest[name] = _reshaped(base, info)
            elif _differ(base, info):
                rest[name] = self.why_not.get(name, "no matrix of a layer that can carry an adapter")
        return rest

    def _named(self, targets: ModuleTargets, modules: dict[str, nn.Module]) -> set[str]:
        if targets.target_modules == ALL_LINEAR:
            modules = {name: module for name, module in modules.items() if kind_of(module) == "linear"}
        everything = replace(targets, target_modules=ALL_LINEAR) if targets.target_modules is None else targets
        if everything.target_modules == ALL_LINEAR and targets.layers_to_transform is not None:
            everything = replace(everything, target_modules=tuple(modules))
        return set(everything.select(modules))

    def _why_not(self, layer: str, module: nn.Module, base: StoredParameter | None, method: str, *, asked: bool) -> str:
        """Why a matrix gets no adapter; empty when it does."""
        name = f"{layer}.weight"
        info = self.tuned.stored[name]
        if base is None:
            return _ABSENT
        first = self.tuned.equal.get(name, "")
        embedding = isinstance(module, nn.Embedding) and METHODS[method].peft_type in DIALECTS.keys() - {"LORA"}
        reasons = {
            _reshaped(base, info): base.shape != info.shape,
            f"{info.dtype}, where floats are needed": not {base.dtype, info.dtype} <= {*FLOATS},
            "empty": not info.numel,
            "tied to another tensor in BASE, and not here": _is_tied(self.base.equal, base.name)
            and not self._tied(name),
            f"tied to {first}": first and self._tied_in_base(name, first),
            "tied to the output layer, which an adapter would not reach in a live model": not asked
            and self._tied(name),
            f"an embedding, for which files of {method} have no form that PEFT reads": not asked and embedding,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _tied(self, name: str) -> bool:
        declared = self.tuned.index.config.get("tie_word_embeddings") is True  # and the output layer is not stored
        return _is_tied(self.tuned.equal, name) or (declared and name.split(".")[-2] in _INPUT_EMBEDDINGS)

    def _tied_in_base(self, alias: str, name: str) -> bool:
        first, second = self.base.names.find(alias), self.base.names.find(name)
        return first is None or second is None or not _differ(first, second)


def _reshaped(base: StoredParameter, tuned: StoredParameter) -> str:
    return f"{list(tuned.shape)}, in BASE {list(base.shape)}"


def _is_tied(aliases: Mapping[str, str], name: str) -> bool:
    return name in aliases or name in aliases.values()


def _differ(a: StoredParameter, b: StoredParameter) -> bool:
    first, second = a.whole, b.whole
    if first is None or second is None or first.dtype != second.dtype:
        return not torch.equal(a.read().double(), b.read().double())
    return not same_bytes(first, second)
