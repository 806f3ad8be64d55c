"""The linear layers of a checkpoint in the order in which a model runs them, with what they are given on some text."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel, load_lazily
from spectral_surgery.calibration.early_stop import EarlyStop
from spectral_surgery.calibration.expert_moments import expert_moments
from spectral_surgery.calibration.stored_layers import StoredMatrix, matrices_of
from spectral_surgery.engines.base import Others
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.peft.task import is_causal
from spectral_surgery.hf.models import load_outline
from spectral_surgery.hf.quantizer.fused_experts import expert_matrices
from spectral_surgery.inputs.kind import Reading
from spectral_surgery.inputs.kinds import SEQ_LENGTH, kind_of
from spectral_surgery.inputs.model_input import EqualShapes, ModelInput, equal_shapes
from spectral_surgery.live.blocks import Held
from spectral_surgery.live.moments import moments_of
from spectral_surgery.live.running import fast_bfloat16
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.settings import TextData

IN_MEMORY = 32 << 20  # bytes of activations; more go to files
EXPERT_MOMENTS = 1 << 30  # bytes of the moments of experts at a time
BATCH_TOKENS = 1024  # of a batch: what a block computes on the way has room beside its weights

T = TypeVar("T")
Sharing = Callable[[Sequence[Sequence[ModelInput]]], AbstractContextManager[Others]]  # of batches


@dataclass(frozen=True)
class LayerMoment:
    """A stored matrix in its turn.

    Attributes:
        block: name of the block that multiplies by it; empty when the model has no list of blocks.
        matrix: the matrix, and the layers that have its rows.
        moment: H = Xᵀ X of what they are given, [I, I] float32.
        target: the matrix whose outputs are wanted, as it is stored, float32; None where that is the matrix itself.
    """

    block: str
    matrix: StoredMatrix
    moment: Tensor
    target: Tensor | None = None

    @property
    def tensor(self) -> str:
        """Its name in the checkpoint."""
        return self.matrix.tensor

    @property
    def transposed(self) -> bool:
        """Whether it is stored as [I, O]."""
        return self.matrix.transposed

    @property
    def rows(self) -> tuple[int, int]:
        """From and to, of the tensor that holds it, seen as one matrix."""
        return self.matrix.first, self.matrix.first + len(self.matrix.weight)


@dataclass(frozen=True)
class Group:
    """Matrices of a block whose layers are seen in one run.

    Attributes:
        block: name of the block.
        matrices: some of its matrices.
        moments: runs the block on all samples. Gives H of the inputs of each layer, by its name in the block, without
            layers that no token came to.
    """

    block: str
    matrices: Sequence[StoredMatrix]
    moments: Callable[[], dict[str, Tensor]]

    def turns(self, moments: dict[str, Tensor]) -> Iterator[LayerMoment]:
        """The matrices that a token comes to; moments that are not needed any more are taken away."""
        left = Counter(key for matrix in self.matrices for key in matrix.layers)  # an expert's gate and up share one
        for matrix in self.matrices:
            inputs = [moments[key] for key in matrix.layers if key in moments]
            left -= Counter(list(matrix.layers))
            for key in matrix.layers:
                if key not in left:
                    moments.pop(key, None)
            if inputs:
                yield LayerMoment(self.block, matrix, _mean(inputs).cpu())

    def weights(self) -> list[Tensor]:
        """The matrices as they are now."""
        return [matrix.weight for matrix in self.matrices]

    def put(self, weights: Sequence[Tensor]) -> None:
        """Have these matrices."""
        for matrix, weight in zip(self.matrices, weights, strict=True):
            matrix.put(weight)


def layer_moments(
    lazy: LazyModel,
    inputs: Sequence[ModelInput],
    names: Container[str],
    *,
    folder: Path | None = None,
    progress: Progress = silent,
    sharing: Sharing | None = None,
) -> Iterator[LayerMoment]:
    """Visit the layers in blocks, one block in memory at a time; layers that no sample reaches are left out.

    All layers of a block are seen with the blocks before it as they were left, see `StoredMatrix.put`; of many experts
    the later ones also with the layers of their own block.

    Args:
        progress: counts matrices; the tokens per second that it tells are those of the text through the whole model,
            with what the caller does to each layer.
        sharing: who runs the model on all batches but the first.
    """
    count, total = 0, len(matrices_of(lazy.names, names, "", lazy.model))
    batches, started = equal_shapes(inputs, BATCH_TOKENS, lazy.device), time.perf_counter()
    with ExitStack() as held:
        store = held.enter_context(closing(ActivationStore(IN_MEMORY, folder)))
        others, ours = None, batches
        if sharing is not None and len(batches) > 1:
            first, *rest = batches.groups
            others = held.enter_context(sharing(rest))
            ours = EqualShapes([first], lazy.device)
        for group in groups_in_turn(lazy, ours, names, store.put):
            moments = group.moments() if others is None else others.total(group.moments())
            for turn in group.turns(moments):
                yield turn
                count += 1
                through = batches.tokens * count / total / (time.perf_counter() - started)
                progress(count, total, f"{turn.tensor}, {through:,.0f} tokens/s")
            if others is not None:
                others.tell(group.weights())


def groups_in_turn(
    lazy: LazyModel, batches: EqualShapes, names: Container[str], keep: Callable[[Tensor], Held]
) -> Iterator[Group]:
    """The matrices in the order of the blocks, each to be changed in its turn."""
    for block, module, run in _computed(lazy, lazy.chain.in_turn(batches, keep)):
        matrices = matrices_of(lazy.names, names, f"{block}." if block else "", module)
        yield from _groups(lazy, block, matrices, run)


def moments_in_turn(
    lazy: LazyModel, block: str, matrices: Sequence[StoredMatrix], run: Callable[[], Iterator[Tensor]]
) -> Iterator[LayerMoment]:
    """The matrices of a block that a token comes to, with their moments.

    Args:
        block: its name.
        run: runs it on all samples.
    """
    for group in _groups(lazy, block, matrices, run):
        yield from group.turns(group.moments())


def _computed(lazy: LazyModel, turns: Iterator[T]) -> Iterator[T]:
    """The same, with what is computed between two of them in the arithmetic of the model, and nothing else."""
    while True:
        with lazy.computing():
            turn = next(turns, None)
        if turn is None:
            return
        yield turn


def _groups(
    lazy: LazyModel, block: str, matrices: Sequence[StoredMatrix], run: Callable[[], Iterator[Tensor]]
) -> Iterator[Group]:
    """All layers together, and as many experts as their moments fit into memory; then more experts, if there are."""
    group: list[StoredMatrix] = []
    nbytes: dict[str, int] = {}
    for matrix in matrices:
        group.append(matrix)
        nbytes |= {key: 4 * expert.width**2 for key, expert in matrix.experts.items()}
        if sum(nbytes.values()) > EXPERT_MOMENTS:
            yield Group(block, group, partial(_moments, lazy, group, run))
            group, nbytes = [], {}
    if group:
        yield Group(block, group, partial(_moments, lazy, group, run))


def _moments(lazy: LazyModel, group: Sequence[StoredMatrix], run: Callable[[], Iterator[Tensor]]) -> dict[str, Tensor]:
    """By name of the layer, while a block runs on all samples; without layers that no token came to."""
    layers = {key: layer for matrix in group for key, layer in matrix.modules.items()}
    experts = {key: expert for matrix in group for key, expert in matrix.experts.items()}
    stop = EarlyStop([*layers, *experts])  # which is not told of the calls of experts: with them, it never ends a run
    with lazy.computing(), moments_of(layers, stop.seen) as moments, expert_moments(experts) as of_experts:
        for _ in run():
            stop.finished()
    return moments | of_experts


def _mean(moments: Sequence[Tensor]) -> Tensor:
    """Of layers whose rows are stored as one matrix: mostly they are given the same, and have the same sum."""
    first, *others = moments
    if all(moment is first for moment in others):
        return first
    return torch.stack(list(moments)).mean(0)


def model_and_inputs(
    source: Path, index: CheckpointIndex, data: TextData, device: str = "cpu", *, exact: bool = False
) -> tuple[LazyModel, list[ModelInput]]:
    """The model to calibrate, and what to calibrate it on.

    Args:
        device: where it will run.
        exact: compute in float32 also where products of bfloat16 are faster.

    Raises:
        ConfigError: when there is nothing that the model reads, or it does not know its tokens.
    """
    kind, trust = kind_of(data.file, index.config), data.trust_remote_code
    outline = load_outline(source, kind.auto_class, trust_remote_code=trust)
    reading = Reading(data, source, index.config, outline, data.seq_length or SEQ_LENGTH, is_causal(index.config))
    inputs = kind.read(reading, data.samples or kind.samples)
    bf16 = not exact and fast_bfloat16(torch.device(device).type)
    where = source, index, kind.auto_class
    lazy = load_lazily(
        *where, trust_remote_code=trust, device=device, bf16=bf16, given=inputs[0].shapes, outline=outline
    )
    if any(expert_matrices(part) for part in lazy.model.modules()):
        lazy = replace(lazy, bf16=False)  # many experts multiply activations by their matrices without a cast
    return lazy, inputs
