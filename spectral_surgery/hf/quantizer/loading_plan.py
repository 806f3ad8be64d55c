"""Which tensor of a compressed folder goes where in a model of transformers, and what becomes of it there.

A linear layer or an embedding becomes a layer that multiplies by the spectrum; so does a subclass that only adds to
what these do, and each of several layers among which transformers divides the rows of one tensor. Fused experts, and
other parameters that their modules only multiply by, stay spectra too. Any other compressed tensor (convolutions,
position tables that are added) is held dense: `Plan.dense` names them.
Source: transformers 5.24, `core_model_loading.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.lossless import LOSSLESS_SUFFIXES
from spectral_surgery.files.compressed.manifest import SUFFIXES, TensorRecord
from spectral_surgery.hf.quantizer.class_swap import standing_for
from spectral_surgery.hf.quantizer.fused_experts import Stored, stored_matrices
from spectral_surgery.hf.quantizer.weight_uses import only_multiplies
from spectral_surgery.hf.tensor_names import ANY, placing, sources_of
from spectral_surgery.live.heads import classifier_heads

MESSENGER = rf"(?:{SUFFIXES[2]}|{LOSSLESS_SUFFIXES[1]})"  # what transformers reads of a tensor that is coded


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a folder go.

    Attributes:
        sources: as of `sources_of`, only parameters that something compressed goes into.
        made: the same parameters -> all that are made with them, themselves first.
        slots: parameter -> all parameters tied to it, itself first: those whose module becomes a spectral layer.
        divided: parameter -> first row of each of those in `made`: layers that have a range of rows of one spectrum.
        experts: parameter -> stored names, of parameters of other modules that are run from their codes.
        aliases: second name -> first name, parameters of equal bytes that the files hold once.
        exact: parameters that nothing is lost of, although they are coded.
        apart: parameters that the model would tie to others, but that the files hold by themselves.
    """

    sources: dict[str, dict[str, list[str]]]
    made: dict[str, tuple[str, ...]]
    slots: dict[str, tuple[str, ...]]
    divided: dict[str, tuple[int, ...]]
    experts: dict[str, Stored]
    aliases: dict[str, str]
    apart: frozenset[str]
    exact: frozenset[str] = frozenset()

    @property
    def tied(self) -> dict[str, str]:
        """Aliases that are not among the slots, so that transformers has to tie them."""
        ours = {name for group in self.slots.values() for name in group}
        return {alias: name for alias, name in self.aliases.items() if alias not in ours}

    @cached_property
    def dense(self) -> dict[str, tuple[str, ...]]:
        """Parameters that are decoded when they are loaded, and all that are made with them."""
        spectral = self.slots.keys() | self.divided.keys() | self.experts.keys()
        return {target: self.made[target] for target in self.sources if target not in spectral}

    def matrices(self, target: str) -> list[tuple[str, ...]]:
        """Stored names of a parameter that is not dense: those of tensors whose rows are one matrix together."""
        return list(zip(*self.experts[target], strict=True)) if target in self.experts else [(self.stored(target)[0],)]

    def cuts(self, names: tuple[str, ...], record: TensorRecord) -> Sequence[int]:
        """Rows at which layers or experts begin in what `matrices` named; any part may be one where no shape tells.

        ``record`` is that of the first name.
        """
        if names in self._layers:
            return self._layers[names]
        if len(names) > 1 or names not in self._stacks:
            return ()
        parts = tuple(part.rows[0] for part in record.parts)
        return parts if len(record.shape) == 2 else range(0, record.matrix[0], record.shape[-2])

    @cached_property
    def _layers(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {self.matrices(target)[0]: starts for target, starts in self.divided.items()}

    @cached_property
    def _stacks(self) -> set[tuple[str, ...]]:
        """Of parameters that are one tensor."""
        found = (self.matrices(target) for target in self.experts)
        return {names for matrices in found if len(matrices) == 1 for names in matrices}

    def stored(self, target: str) -> list[str]:
        """All stored names of a parameter in `sources`."""
        return [name for names in self.sources[target].values() for name in names]


def make_plan(model: Any, checkpoint: CompressedCheckpoint, conversions: Sequence[Any]) -> Plan:
    """Decide where everything goes.

    Returns the plan; names that the model does not have are left out, and transformers reports them.
    """
    from transformers.core_model_loading import WeightConverter

    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected, place = model.state_dict(), placing(model, conversions)
    tensors = checkpoint.manifest.tensors
    stored = {f"{name}.{suffix}" for name in tensors for suffix in SUFFIXES}
    plain = (name for name in checkpoint.index.tensors if name not in stored)
    sources = sources_of(model, (*tensors, *plain), conversions)
    ties = model.all_tied_weights_keys
    apart = frozenset(one for one, other in ties.items() if one in sources and other in sources)
    stored_of = {target: [name for names in by.values() for name in names] for target, by in sources.items()}
    coded = {*tensors, *checkpoint.manifest.lossless}
    sources = {target: by for target, by in sources.items() if not coded.isdisjoint(stored_of[target])}
    exact = frozenset(target for target in sources if tensors.keys().isdisjoint(stored_of[target]))
    again = {place(alias)[0]: place(name)[0] for alias, name in checkpoint.manifest.aliases.items()}
    again = {alias: name for alias, name in again.items() if alias != name and {alias, name} <= expected.keys()}
    groups = _groups([*((one, other) for one, other in ties.items() if one not in apart), *again.items()])
    owner = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    made = {target: _made(target, owner.get(next(iter(by))), expected) for target, by in sources.items()}
    slots: dict[str, tuple[str, ...]] = {}
    divided: dict[str, tuple[int, ...]] = {}
    heads = tuple(f"{name}." for name in classifier_heads(model))  # adapters train copies of them, which must be dense
    inside = {
        target: by
        for target, by in sources.items()
        if not (heads and target.startswith(heads)) and tensors.keys() >= set(stored_of[target])
    }
    for target, by in inside.items():
        group = (target, *(other for other in groups.get(target, ()) if other != target))
        shape = tensors[by[ANY][0]].shape if ANY in by else None
        if shape is not None and all(_becomes_spectral(model, name, shape, alone=len(group) == 1) for name in group):
            slots[target] = group
        elif ANY not in by and groups.keys().isdisjoint(made[target]):
            starts = _divided(model, made[target], by, tensors, owner[next(iter(by))])
            divided |= {target: starts} if starts else {}
    matrices = {target: stored_matrices(model, target, by, tensors, converters) for target, by in inside.items()}
    experts = {
        target: stored
        for target, stored in matrices.items()
        if stored and target not in groups and target not in slots and target not in divided
    }
    return Plan(sources, made, slots, divided, experts, again, apart, exact)


def _groups(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Every name with all names that are tied to it, over any number of steps."""
    groups: dict[str, set[str]] = {}
    for one, other in pairs:
        whole = groups.get(one, {one}) | groups.get(other, {other})
        groups |= dict.fromkeys(whole, whole)
    return groups


def _made(target: str, converter: Any, expected: Iterable[str]) -> tuple[str, ...]:
    """All parameters that a converter makes with one; it goes by the first of its patterns."""
    if converter is None or len(converter.target_patterns) == 1:
        return (target,)
    first, *others = converter.target_patterns
    before, separator, after = target.partition(first)
    names = (f"{before}{pattern}{after}" for pattern in others) if separator else ()
    return (target, *(name for name in names if name in expected))


def _becomes_spectral(model: nn.Module, parameter: str, shape: tuple[int, ...], *, alone: bool) -> bool:
    """Whether a layer of ours can stand in."""
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight" or not owner or tuple(cast(Tensor, module.weight).shape) != shape:
        return False
    if is_conv1d(module):
        return alone  # it has the transposed weight
    cls: Any = type(module)
    if cls in (nn.Linear, nn.Embedding):
        return cls is nn.Linear or module.max_norm is None
    known = isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and module.max_norm is None)
    outside = isinstance(module, NonDynamicallyQuantizableLinear)  # nn.MultiheadAttention computes with its weight
    return known and not outside and not hasattr(module, "spectrum") and only_multiplies(cls, leaf) and _fits(cls)


def _fits(cls: Any) -> bool:
    try:
        standing_for(cls)
    except TypeError:
        return False
    return True


def _divided(
    model: nn.Module,
    made: Sequence[str],
    by: Mapping[str, Sequence[str]],
    tensors: Mapping[str, TensorRecord],
    converter: Any,
) -> tuple[int, ...]:
    """First rows of layers that one tensor is cut into; nothing where cuts go through tiles, or more is done."""
    from transformers.core_model_loading import Chunk, Split

    names = [name for group in by.values() for name in group]
    plain = len(converter.operations) == 1 and type(converter.operations[0]) in (Chunk, Split)
    if not plain or converter.operations[0].dim != 0 or len(names) != 1 or len(made) != len(converter.target_patterns):
        return ()
    record = tensors[names[0]]
    shapes = [tuple(model.get_parameter(name).shape) for name in made]
    starts = [0, *accumulate(shape[0] for shape in shapes)]
    alike = type(converter.operations[0]) is Split or len({shape[0] for shape in shapes}) == 1
    fits = record.shape == record.matrix == (starts[-1], shapes[0][-1]) and alike
    if not fits or not all(_cuts_between_tiles(record, row) for row in starts):
        return ()
    spectral = all(_becomes_spectral(model, name, shape, alone=True) for name, shape in zip(made, shapes, strict=True))
    return tuple(starts[:-1]) if spectral and not any(is_conv1d(_owner(model, name)) for name in made) else ()


def _cuts_between_tiles(record: TensorRecord, row: int) -> bool:
    inside = [part.rows[0] for part in record.parts if part.rows[0] < row < part.rows[1]]
    return 0 not in record.axes or all((row - start) % record.tile == 0 for start in inside)


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def check_used(checkpoint: CompressedCheckpoint, plan: Plan) -> None:
    """Refuse a folder of which nothing goes into the model.

    Raises CheckpointError when no compressed tensor has a place.
    """
    coded = [*checkpoint.manifest.tensors, *checkpoint.manifest.lossless]
    if coded and not plan.sources:
        some = ", ".join(coded[:3])
        raise CheckpointError(
            f"{checkpoint.index.root.name}: expected the class of the architecture in config.json, got a model with"
            f" none of the {len(coded)} compressed tensors ({some}). Load it with that class."
        )


def stripping(names: Sequence[str], others: Sequence[str], patterns: Sequence[str]) -> str:
    """A regular expression that takes the suffix off messengers that converters of transformers should see as weights.

    Returns with the stripped name as its first group.

    ``others``: other compressed tensors, which it must not match.
    """
    general = "|".join(pattern.replace("*.", r".*\.") for pattern in patterns)
    expression = rf"^(.*(?:{general}).*)\.{MESSENGER}"
    if any(re.search(expression, f"{name}.{SUFFIXES[2]}") for name in others):
        expression = rf"^({'|'.join(map(re.escape, names))})\.{MESSENGER}"
    return expression


def held_dense(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Parameters that files hold compressed and memory does not, with the class of their module."""
    names = (name for target, made in plan.dense.items() if target not in plan.exact for name in made)
    return {name: type(_owner(model, name)).__name__ for name in names}


def said_of_dense(checkpoint: CompressedCheckpoint, plan: Plan, held: Mapping[str, str]) -> str:
    """One line about `held_dense`. ``held``: what it gave; not empty."""
    tensors = checkpoint.manifest.tensors
    names = [name for target in plan.dense for name in plan.stored(target) if name in tensors]
    share = sum(tensors[name].report.weights for name in names) / checkpoint.manifest.report.weights
    kinds = ", ".join(f"{count} of {kind}" for kind, count in Counter(held.values()).most_common(5))
    return (
        f"{checkpoint.index.root.name}: {len(names)} of {len(tensors)} compressed tensors, {share:.1%} of their"
        " weights, are held dense in memory, as heads that are trained whole, or since their modules do more than"
        f" multiply by them ({kinds});"
        " model.hf_quantizer.held_dense names them."
    )


def row_ranges(plan: Plan, target: str, rows: int) -> Iterator[tuple[int, int]]:
    """First and last row of each parameter of a divided one, in the order of `Plan.made`.

    ``plan``: with the parameter in `divided`.
    """
    return pairwise([*plan.divided[target], rows])
