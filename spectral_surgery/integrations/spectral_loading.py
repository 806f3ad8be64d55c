"""Which tensor of a compressed folder goes where in a model of transformers, and how it gets there.

transformers renames stored names, ties parameters and decides devices and dtypes; all of that is kept. Of the three
tensors of a spectrum it reads the smallest, the step, as a messenger: when the step of a weight arrives, on the device
and in the dtype that the weight should have, the weight is read from the files by our own reader. A linear layer or an
embedding becomes a layer that multiplies by the spectrum, and fused experts multiply by one spectrum each. Any other
compressed tensor (convolutions, position tables, subclasses with a forward of their own) is decoded into its parameter,
one at a time.
Source: transformers 5.23, `core_model_loading.py` and `modeling_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.checkpoint.compressed import CompressedCheckpoint
from spectral_surgery.checkpoint.manifest import SUFFIXES
from spectral_surgery.errors import CheckpointError, ConfigError, SpectralSurgeryError
from spectral_surgery.integrations.ahead import Ahead
from spectral_surgery.integrations.experts import Stored, install_experts, stored_experts
from spectral_surgery.integrations.stand_ins import stand_in
from spectral_surgery.layers import SpectralConv1D, SpectralEmbedding, SpectralLinear, SpectralWeight
from spectral_surgery.ops.spectral_matmul import RESIDENTS, Form, resident_form

AUTO, NARROW, STREAMED = "auto", "narrow", "streamed"
STEP = SUFFIXES[2]
UNREAD = r"\.spectral_(codes|frames)$"  # tensors that transformers never reads
Resident = tuple[list[Form], str]  # forms of row ranges, and the name in RESIDENTS
_FIRST = {AUTO: "int8", NARROW: "int4", STREAMED: STREAMED}  # where codes do not fit these, weights are coded
_ANY = ""  # the pattern of a tensor that is renamed at most


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a folder go.

    Attributes:
        sources: parameter -> pattern of the converter that makes it -> stored names, in the order of transformers; only
            parameters that something compressed goes into. The pattern is empty for a mere renaming.
        slots: parameter -> all parameters tied to it, itself first: those whose module becomes a spectral layer.
        experts: parameter -> stored names, of fused experts that are run from their codes.
        aliases: second name -> first name, parameters of equal bytes that the files hold once.
    """

    sources: dict[str, dict[str, list[str]]]
    slots: dict[str, tuple[str, ...]]
    experts: dict[str, Stored]
    aliases: dict[str, str]

    @property
    def tied(self) -> dict[str, str]:
        """Aliases that are not among the slots, so that transformers has to tie them."""
        ours = {name for group in self.slots.values() for name in group}
        return {alias: name for alias, name in self.aliases.items() if alias not in ours}


def make_plan(model: Any, checkpoint: CompressedCheckpoint, conversions: Sequence[Any]) -> Plan:
    """Decide where everything goes.

    Args:
        model: a PreTrainedModel whose parameters are on the meta device.
        checkpoint: the folder.
        conversions: renamings and converters of transformers for this model.

    Returns:
        The plan; names that the model does not have are left out, and transformers reports them.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix

    def place(name: str) -> tuple[str, str]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], prefix, expected)
        return renamed, pattern or _ANY

    tensors = checkpoint.manifest.tensors
    stored = {f"{name}.{suffix}" for name in tensors for suffix in SUFFIXES}
    names = [*tensors, *(name for name in checkpoint.index.tensors if name not in stored)]
    sources: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = place(name)
        if target in expected:
            sources.setdefault(target, {}).setdefault(pattern, []).append(name)
    sources = {
        target: by for target, by in sources.items() if any(name in tensors for own in by.values() for name in own)
    }
    again = {place(alias)[0]: place(name)[0] for alias, name in checkpoint.manifest.aliases.items()}
    again = {alias: name for alias, name in again.items() if alias != name and {alias, name} <= expected.keys()}
    groups = _groups([*model.all_tied_weights_keys.items(), *again.items()])
    slots = {}
    for target, by in sources.items():
        group = (target, *(other for other in groups.get(target, ()) if other != target))
        shape = tensors[by[_ANY][0]].shape if _ANY in by else None
        if shape is not None and all(_becomes_spectral(model, name, shape, alone=len(group) == 1) for name in group):
            slots[target] = group
    found = {target: stored_experts(model, target, by, tensors, converters) for target, by in sources.items()}
    experts = {target: stored for target, stored in found.items() if stored and target not in groups}
    return Plan(sources, slots, experts, again)


def _groups(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Every name with all names that are tied to it, over any number of steps."""
    groups: dict[str, set[str]] = {}
    for one, other in pairs:
        whole = groups.get(one, {one}) | groups.get(other, {other})
        groups |= dict.fromkeys(whole, whole)
    return groups


def _becomes_spectral(model: nn.Module, parameter: str, shape: tuple[int, ...], *, alone: bool) -> bool:
    """Whether a layer of ours can stand in: exact types only, since a subclass may have a forward of its own."""
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight" or not owner or tuple(cast(Tensor, module.weight).shape) != shape:
        return False
    if is_conv1d(module):
        return alone  # it has the transposed weight
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' transposed linear layer."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


@dataclass
class Loading:
    """One load: the folder, the plan, and what is left to do.

    Attributes:
        checkpoint: the folder.
        residents: resident form by stored name; ``auto`` for others.
        plan: made when transformers has settled its conversions.
        unset: biases that are in no file.
        conversions: of transformers alone, that were used; what save_pretrained reverts.
        renaming: ours, by which messengers reach converters of transformers.
        ahead: the forms of matrices, made on all cores before they are installed.
        error: the first one. transformers would go on and report it as one of many; it is raised in the end.
    """

    checkpoint: CompressedCheckpoint
    residents: Mapping[str, str]
    plan: Plan | None = None
    unset: list[str] = field(default_factory=list)
    conversions: list[Any] = field(default_factory=list)
    renaming: Any = None
    ahead: Ahead[Resident] | None = None
    error: SpectralSurgeryError | None = None

    def fill(
        self, model: nn.Module, target: str, tensors: Mapping[str, list[Tensor]], missing: set[str]
    ) -> dict[str, list[Tensor]]:
        """Load the weight whose messenger has arrived.

        Args:
            model: being loaded.
            target: a parameter.
            tensors: what transformers read for it by pattern, steps in the place of what is compressed.
            missing: parameters that have no value yet; those that get one here are taken out.

        Returns:
            The same with steps replaced by decoded tensors; nothing when a layer of ours took the place.
        """
        plan = cast(Plan, self.plan)
        group, by, experts = plan.slots.get(target, ()), plan.sources[target], plan.experts.get(target)
        missing.difference_update(group or {target})
        tied = cast("dict[str, str]", model.all_tied_weights_keys)
        if self.error is not None:
            return {}
        try:
            if experts:
                stored = [[self._taken(name) for name in names] for names in experts]
                install_experts(model, target, stored, next(iter(tensors.values()))[0])
                return {}
            if not group:
                return {pattern: self._decoded(by[pattern], read) for pattern, read in tensors.items()}
            self._install(model, group, by[_ANY][0], next(iter(tensors.values()))[0])
        except SpectralSurgeryError as error:
            self.error = error
            return {}
        for name in group:
            bias = f"{name.removesuffix('weight')}bias"
            if bias in missing and bias not in tied:
                self.unset.append(bias)
        return {}

    def _decoded(self, names: Sequence[str], read: Sequence[Tensor]) -> list[Tensor]:
        compressed = self.checkpoint.manifest.tensors
        return [
            decoded(self.checkpoint, name).to(tensor) if name in compressed else tensor
            for name, tensor in zip(names, read, strict=True)
        ]

    def _install(self, model: nn.Module, group: Sequence[str], name: str, like: Tensor) -> None:
        weight: SpectralWeight | None = None
        for parameter in group:
            owner = parameter.removesuffix(".weight")
            module = model.get_submodule(owner)
            layer: SpectralConv1D | SpectralEmbedding | SpectralLinear
            weight = weight or self._weight(name, like)
            if is_conv1d(module):
                layer = SpectralConv1D.from_weight(weight)
            elif isinstance(module, nn.Embedding):
                layer = SpectralEmbedding(weight, module.padding_idx)
            else:
                layer = SpectralLinear(weight)
            if not isinstance(layer, SpectralEmbedding):
                layer.bias = module.bias  # type: ignore[assignment]  # transformers loads it
            layer._is_hf_initialized = True  # type: ignore[assignment]  # there is nothing to initialise
            parent, _, leaf = owner.rpartition(".")
            setattr(model.get_submodule(parent), leaf, stand_in(layer))

    def begin(self) -> None:
        """Expect what the plan will install, in the order in which transformers asks for it."""
        plan = cast(Plan, self.plan)
        names: list[str] = []
        for target, by in plan.sources.items():
            if target in plan.experts:
                names += [name for own in plan.experts[target] for name in own]
            elif target in plan.slots:
                names.append(by[_ANY][0])
        self.checkpoint = self.checkpoint.with_tables()
        self.ahead = Ahead(self._forms, names, torch.get_num_threads())

    def _forms(self, name: str) -> Resident:
        return resident_forms(self.checkpoint, name, self.residents.get(name, AUTO))

    def _taken(self, name: str) -> Resident:
        return self.ahead.take(name) if self.ahead else self._forms(name)

    def _weight(self, name: str, like: Tensor) -> SpectralWeight:
        forms, resident = self._taken(name)
        weight = SpectralWeight(forms, resident, like.dtype)
        return weight if like.is_cpu else weight.to(like.device)


def decoded(checkpoint: CompressedCheckpoint, name: str) -> Tensor:
    """A compressed tensor as it was: float32, in its original shape."""
    record = checkpoint.manifest.tensors[name]
    parts = [checkpoint.part(name, part).to_dense() for part in range(len(record.parts))]
    return torch.cat(parts).reshape(record.shape)


def resident_forms(checkpoint: CompressedCheckpoint, name: str, resident: str) -> Resident:
    """A compressed matrix in memory; one part of it is read at a time.

    Args:
        checkpoint: the folder.
        name: of a matrix in the manifest.
        resident: name in RESIDENTS, or ``auto``: int8 where codes fit, else coded; ``narrow`` is the same with int4.
            Where they do not fit what is streamed, they are coded too.

    Returns:
        Its forms, and the name in RESIDENTS.

    Raises:
        ConfigError: when the codes do not fit the resident form.
    """
    parts = range(len(checkpoint.manifest.tensors[name].parts))
    wanted = _FIRST.get(resident, resident)
    try:
        return [resident_form(checkpoint.part(name, part), wanted) for part in parts], wanted
    except ConfigError as error:
        if resident not in _FIRST:
            raise ConfigError(f"{name}: {error}") from None
    return resident_forms(checkpoint, name, "coded")


def resident_bytes(checkpoint: CompressedCheckpoint, name: str, resident: str) -> int:
    """Bytes of a compressed tensor where it computes, in a resident form, or in the larger one of two."""
    report = checkpoint.manifest.tensors[name].report
    forms = (_FIRST[resident], "coded") if resident in (AUTO, NARROW) else (resident,)
    return max(RESIDENTS[form].most_bytes(report.weights, report.stored_bytes) for form in forms)


def residents_for(checkpoint: CompressedCheckpoint, resident: str) -> dict[str, str]:
    """The resident form of every compressed tensor.

    Args:
        checkpoint: the folder.
        resident: name in RESIDENTS, or ``auto``.

    Raises:
        ConfigError: when there is no such form.
    """
    if resident != AUTO:
        RESIDENTS[resident]
    return dict.fromkeys(checkpoint.manifest.tensors, resident)


def stripping(names: Sequence[str], others: Sequence[str], patterns: Sequence[str]) -> str:
    """A regular expression that takes the suffix off messengers that converters of transformers should see as weights.

    Args:
        names: compressed tensors whose parameter a converter makes.
        others: other compressed tensors, which it must not match.
        patterns: of those converters.

    Returns:
        With the stripped name as its first group.
    """
    general = "|".join(pattern.replace("*.", r".*\.") for pattern in patterns)
    expression = rf"^(.*(?:{general}).*)\.{STEP}"
    if any(re.search(expression, f"{name}.{STEP}") for name in others):
        expression = rf"^({'|'.join(map(re.escape, names))})\.{STEP}"
    return expression


def check_used(checkpoint: CompressedCheckpoint, plan: Plan) -> None:
    """Refuse a folder of which nothing goes into the model.

    Raises:
        CheckpointError: when no compressed tensor has a place.
    """
    if not plan.sources:
        some = ", ".join(list(checkpoint.manifest.tensors)[:3])
        raise CheckpointError(
            f"{checkpoint.index.root.name}: none of its {len(checkpoint.manifest.tensors)} compressed tensors ({some})"
            " is in the model; the class of the architecture in config.json is accepted. Load it with that class."
        )
