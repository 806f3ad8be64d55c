"""A share of the samples of a calibration, run elsewhere: what the layers are given there, to be added up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel
from spectral_surgery.calibration.layer_moments import EXPERT_MOMENTS, IN_MEMORY, Group, Sharing, groups_in_turn
from spectral_surgery.calibration.stored_layers import matrices_of
from spectral_surgery.engines.base import Others, Share, Split
from spectral_surgery.engines.part import check_source
from spectral_surgery.inputs.model_input import EqualShapes, ModelInput

Shares = Callable[[Split], AbstractContextManager[Others]]


@dataclass
class MomentShare:
    """The moments of what layers are given on some batches.

    Attributes:
        load: loads the model.
        bf16: whether its products are those of bfloat16.
        batches: what it is run on.
        names: tensors that are wanted.
        sizes: bytes of the files of the model.
        memory: bytes that it takes.
    """

    load: Callable[[], LazyModel]
    bf16: bool
    batches: EqualShapes
    names: Collection[str]
    sizes: Mapping[Path, int]
    memory: int
    _groups: Iterator[Group] | None = None
    _group: Group | None = None
    _done: int = 0

    def sums(self, changes: Sequence[Callable[[], Sequence[Tensor]]]) -> dict[str, Tensor]:
        """The moments of the next group, with those before it as they were changed; nothing after the last one."""
        if self._groups is None:
            check_source(self.sizes)
            self._groups = self._in_turn()
            self._group = next(self._groups, None)
        for change in changes[self._done :]:
            if self._group is not None:
                self._group.put(change())
            self._group = next(self._groups, None)
        self._done = len(changes)
        return self._group.moments() if self._group is not None else {}

    def _in_turn(self) -> Iterator[Group]:
        with closing(ActivationStore(IN_MEMORY)) as store:
            yield from groups_in_turn(replace(self.load(), bf16=self.bf16), self.batches, self.names, store.put)


def sharing(lazy: LazyModel, names: Collection[str], sizes: Mapping[Path, int], shares: Shares) -> Sharing:
    """How batches are shared.

    Args:
        lazy: the model.
        names: tensors that are wanted.
        sizes: bytes of the files of the model.
        shares: who takes the shares.
    """

    def split(groups: Sequence[Sequence[ModelInput]], count: int) -> Sequence[Share]:
        memory, read = _memory(lazy, names), [[_copied(one) for one in group] for group in groups]
        return [
            MomentShare(lazy.again, lazy.bf16, EqualShapes(read[first::count], lazy.device), names, sizes, memory)
            for first in range(min(count, len(read)))
        ]

    return lambda groups: shares(partial(split, groups))


def _copied(one: ModelInput) -> ModelInput:
    """The same, with its tensors in it."""
    return ModelInput.of({name: tensor.clone() for name, tensor in one.read().items()}, one.padding)


def _memory(lazy: LazyModel, names: Collection[str]) -> int:
    """Of the largest block in float32, and the moments of its layers."""
    blocks = [(f"{stack.prefix}.{n}.", block) for stack in lazy.chain.stacks for n, block in enumerate(stack.blocks)]
    largest = 0
    for name, block in blocks or [("", lazy.model)]:
        matrices = matrices_of(lazy.names, names, name, block)
        weights = sum(parameter.numel() for parameter in block.parameters())
        layers = sum(matrix.weight.shape[0 if matrix.transposed else 1] ** 2 for matrix in matrices if matrix.modules)
        experts = sum(expert.width**2 for matrix in matrices for expert in matrix.experts.values())
        largest = max(largest, 4 * (weights + layers) + min(4 * experts, EXPERT_MOMENTS))
    return largest + IN_MEMORY
