"""Which tensors of a checkpoint a merge changes, found and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.files.merge_record import Source, Span, is_merged
from spectral_surgery.files.peft.adapter_files import read_adapter
from spectral_surgery.files.storage import Checkpoint, path_of
from spectral_surgery.targets import ModuleTargets


@dataclass(frozen=True)
class Patch:
    """Rows of a tensor that are replaced.

    Attributes:
        values: [N, columns], or a whole tensor.
        spans: (row of values, row of the tensor, number); none where the whole tensor is replaced.
        turned: whether rows are those of the tensor with its last two dimensions exchanged.
    """

    values: Tensor
    spans: tuple[Span, ...] = ()
    turned: bool = False


@dataclass(frozen=True)
class Target:
    """A tensor that is changed: replaced first, then updated, then single rows are replaced.

    Attributes:
        info: where its numbers are before; None for one that the base does not have.
        sources: of its update.
        replaced: what is replaced of it, or all of it: modules_to_save, biases.
        rows: rows that were trained.
    """

    info: TensorInfo | None
    sources: tuple[Source, ...] = ()
    replaced: tuple[Patch, ...] = ()
    rows: tuple[Patch, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        whole = [tuple(patch.values.shape) for patch in self.replaced if not patch.spans]
        return whole[-1] if whole else self.info.shape if self.info else ()


@dataclass(frozen=True)
class MergePlan:
    """A merge, decided.

    Attributes:
        targets: tensors that change, or come in, by name.
        aliases: second name -> first name of tensors that are stored twice, and stay equal.
        tied: name -> name of parameters that are one, and change together; whether both are stored or not.
        untied: parameters that were one and are different tensors afterwards.
        resized: rows before and after, by parameter.
        config: content of config.json afterwards.
    """

    index: CheckpointIndex
    states: tuple[AdapterState, ...]
    weights: tuple[float, ...]
    targets: dict[str, Target] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Tensors that are replaced, in whole or in rows."""
        return tuple(sorted(name for name, target in self.targets.items() if target.replaced or target.rows))

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "tensors": {
                name: [self.weights[source.number] for source in target.sources]
                for name, target in self.targets.items()
                if target.sources
            },
            "replaced": list(self.replaced),
            "tied": self.tied,
            "untied": list(self.untied),
            "resized": {name: list(rows) for name, rows in self.resized.items()},
        }


def plan_merge(base: Checkpoint, adapters: Sequence[Path], weights: Sequence[float] | None = None) -> MergePlan:
    """Read headers and adapters, and find the tensors they belong to.

    Raises:
        ConfigError: when the numbers of adapters and weights differ, or an adapter takes no factor.
        CheckpointError: when something is damaged, the base is merged or quantised, or an adapter does not fit; all
            misfits are listed.
        NotMergeableError: when an adapter is not one weight update.
    """
    from spectral_surgery.commands.merge.find_tensors import Finder

    factors = tuple(weights) if weights is not None else (1.0,) * len(adapters)
    if not adapters or len(factors) != len(adapters):
        raise ConfigError(f"--weights: expected one for each of {len(adapters)} adapters, got {len(factors)}.")
    if is_merged(path_of(base)):
        raise CheckpointError(
            f"{base}: expected a checkpoint without adapters, got one with some merged in. Unmerge it first, and"
            " merge all adapters in one command."
        )
    index = read_index(base)
    index.require_plain()
    finder = Finder(index, tuple(read_adapter(folder) for folder in adapters), factors)
    plan = finder.plan()
    if finder.wrong:
        listed = "; ".join(finder.wrong)
        raise CheckpointError(
            f"{base}: expected the base of the adapter, got one that it does not fit: {listed}. Use that base."
        )
    return plan


def without_extra(state: AdapterState) -> AdapterState:
    """The updates of an adapter alone, for the record."""
    targets = ModuleTargets(tuple(state.layers), fan_in_fan_out=state.spec.targets.fan_in_fan_out)
    return replace(state, spec=replace(state.spec, targets=targets), extra={}, rows={}, parameters={})
