"""Which tensors of a checkpoint a merge changes, found and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.checkpoint.adapter_files import read_adapter
from spectral_surgery.checkpoint.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.checkpoint.merge_record import is_merged
from spectral_surgery.checkpoint.plan import find_tied
from spectral_surgery.errors import CheckpointError, ConfigError, NotMergeableError, SpectralSurgeryError
from spectral_surgery.targets import ModuleTargets

_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Target:
    """A weight that is changed.

    Attributes:
        info: the tensor.
        sources: (number of the adapter, its layer).
        transposed: whether it is stored as [I, O].
    """

    info: TensorInfo
    sources: tuple[tuple[int, str], ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the update."""
        rows, columns = self.info.shape[0], self.info.numel // max(self.info.shape[0], 1)
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class MergePlan:
    """A merge, decided.

    Attributes:
        index: the base.
        states: the adapters.
        weights: factor of each.
        targets: weights that get an update, by tensor name.
        replaced: tensors that are replaced whole, by tensor name: trained biases and modules_to_save.
        aliases: second name -> first name of tied tensors; one that is replaced is tied no more.
    """

    index: CheckpointIndex
    states: tuple[AdapterState, ...]
    weights: tuple[float, ...]
    targets: dict[str, Target]
    replaced: dict[str, Tensor]
    aliases: dict[str, str]


def plan_merge(base: Path, adapters: Sequence[Path], weights: Sequence[float] | None = None) -> MergePlan:
    """Read headers and adapters, and find the tensors they belong to.

    Args:
        base: a plain checkpoint.
        adapters: folders with adapters.
        weights: factor of each; None for 1.

    Raises:
        ConfigError: when the numbers of adapters and weights differ.
        CheckpointError: when something is damaged, the base is merged or quantised, or an adapter does not fit; all
            misfits are listed.
        NotMergeableError: when an adapter is not one weight update.
    """
    factors = tuple(weights) if weights is not None else (1.0,) * len(adapters)
    if not adapters or len(factors) != len(adapters):
        raise ConfigError(f"--weights: {len(factors)} for {len(adapters)} adapters; one for each is accepted.")
    if is_merged(base):
        raise CheckpointError(
            f"{base}: has adapters merged in; a checkpoint without is accepted. Unmerge it first, and merge all "
            "adapters"
            " in one command."
        )
    index = read_index(base)
    if "quantization_config" in index.config:
        raise CheckpointError(
            f"{base}: is quantised or compressed; a plain checkpoint is accepted. Decompress it first."
        )
    states = tuple(read_adapter(folder) for folder in adapters)
    plan = MergePlan(index, states, factors, {}, {}, find_tied(index))
    wrong = [problem for number in range(len(states)) for problem in _add(plan, number)]
    if wrong:
        raise CheckpointError(f"{base}: the adapter does not fit: {'; '.join(wrong)}. Use the base it was made for.")
    tied = {alias: name for alias, name in plan.aliases.items() if not {alias, name} & set(plan.replaced)}
    return replace(plan, aliases=tied)


def _add(plan: MergePlan, number: int) -> list[str]:
    """Find the tensors of one adapter, and say what does not fit."""
    state, wrong = plan.states[number], []
    for layer in state.layers:
        info = tensor_of(plan.index, f"{layer}.weight")
        if info is None:
            wrong.append(f"{layer}.weight is not in the base")
            continue
        info = plan.index.tensors[plan.aliases.get(info.name, info.name)]
        earlier = plan.targets[info.name].sources if info.name in plan.targets else ()
        target = Target(info, (*earlier, (number, layer)), state.spec.targets.fan_in_fan_out)
        plan.targets[info.name] = target
        wrong += _misfit(target, state, layer)
    for name, tensor in state.extra.items():
        plain = name.replace(".base_layer.", ".")
        known = tensor_of(plan.index, plain)
        own = known.name if known else plain
        if own in plan.replaced:
            wrong.append(f"{own} is replaced by two adapters, which must be merged one after the other")
        if known and known.shape != tuple(tensor.shape):
            wrong.append(f"{own} is {list(known.shape)}, in the adapter {list(tensor.shape)}")
        plan.replaced[own] = tensor
    return wrong


def without_extra(state: AdapterState) -> AdapterState:
    """The updates of an adapter alone, for the record."""
    targets = ModuleTargets(tuple(state.layers), fan_in_fan_out=state.spec.targets.fan_in_fan_out)
    return replace(state, spec=replace(state.spec, targets=targets), extra={})


def _misfit(target: Target, state: AdapterState, layer: str) -> list[str]:
    if target.info.dtype not in _DTYPES:
        return [f"{target.info.name} is {target.info.dtype}, where {', '.join(_DTYPES)} are accepted"]
    if len(target.info.shape) < 2:
        return [f"{target.info.name} is {list(target.info.shape)}, no matrix"]
    try:
        state.build(layer, *target.shape)
    except NotMergeableError:
        raise
    except SpectralSurgeryError as error:
        return [str(error)]
    return []


def tensor_of(index: CheckpointIndex, name: str) -> TensorInfo | None:
    """The tensor that a model calls so: the same model with a head has one more prefix, in the file or in memory."""
    if name in index.tensors:
        return index.tensors[name]
    inner = name.partition(".")[2]
    if inner.count(".") >= 2 and inner in index.tensors:
        return index.tensors[inner]
    outer = [
        info
        for own, info in index.tensors.items()
        if own.endswith(f".{name}") and own.count(".") == name.count(".") + 1
    ]
    return outer[0] if len(outer) == 1 else None
