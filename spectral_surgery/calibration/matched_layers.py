"""The linear layers of a model in turn, each with the matrix that would make up for what was compressed before it.

A layer is given x' by the compressed layers before it, where the original gives x. The matrix W* with the least
|W* x' - y|² + ridge |W* - W|² over all tokens does there what W does in the original: y = W x. Of a layer that adds to
the hidden states, y is also what is missing in these by then. Source: the asymmetric calibration of GPTAQ (arXiv
2504.02692), and the layers that undo earlier errors in Qronos (arXiv 2505.11695).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel
from spectral_surgery.calibration.early_stop import EarlyStop
from spectral_surgery.calibration.layer_moments import BATCH_TOKENS, IN_MEMORY, LayerMoment, moments_in_turn
from spectral_surgery.calibration.stored_layers import StoredMatrix, matrices_of
from spectral_surgery.inputs.model_input import ModelInput, equal_shapes
from spectral_surgery.live.blocks import Held, Sample, next_inputs, outputs_of
from spectral_surgery.live.hooks import hooked
from spectral_surgery.live.moments import SecondMoment
from spectral_surgery.progress import Progress, silent

RIDGE = 0.02  # of the mean of the diagonal of the second moment
_EXACT = 1e-3  # relative: what a block returns is what it is given and what layers add to that
_ADDS = 1e-2  # a layer that adds less than that part of its output adds nothing
_TOKENS = 64  # that show what layers add


def matched_layers(
    lazy: LazyModel,
    inputs: Sequence[ModelInput],
    names: Container[str],
    *,
    outside: Callable[[nn.Module], None],
    folder: Path | None = None,
    progress: Progress = silent,
) -> Iterator[LayerMoment]:
    """Visit the layers in blocks, one block in memory at a time, each with the layers before it as they were left.

    Where it is not known what a layer is given in the original, as of fused experts, it has no matrix of its own to
    match.

    Args:
        lazy: a model with a list of blocks.
        inputs: what it is run on.
        names: tensors that are wanted.
        outside: gives the parameters outside of the blocks, such as embeddings, what is stored of them.
        folder: for activations that wait.
        progress: counts matrices.

    Raises:
        UnchainedError: before the first layer of a stack, when the model does something of its own between two blocks.
    """
    chain, batches = lazy.chain, equal_shapes(inputs, BATCH_TOKENS, lazy.device)
    count, total = 0, len(matrices_of(lazy.names, names, "", lazy.model))
    started = time.perf_counter()
    wanted, left = list[list[Held]](), list[list[Held]]()  # what the original and the compressed stacks end with
    with closing(ActivationStore(IN_MEMORY, folder)) as store:
        for number, stack in enumerate(chain.stacks):
            with chain.outside(number), lazy.computing():
                original = chain.enter(number, batches, wanted, store.put)
                outside(lazy.model)
                given = chain.enter(number, batches, left, store.put)
            for place, block in enumerate(stack.blocks):
                name = f"{stack.prefix}.{place}"
                with lazy.holding(f"{name}."):
                    matrices = matrices_of(lazy.names, names, f"{name}.", block)
                    pair = _Pair(lazy, name, block, original, given, store)
                    original = pair.original_outputs(matrices)
                    for turn in pair.turns(matrices):
                        yield turn
                        count += 1
                        through = batches.tokens * count / total / (time.perf_counter() - started)
                        progress(count, total, f"{turn.tensor}, {through:,.0f} tokens/s")
                    with lazy.computing():
                        given = next_inputs(block, given, store.put)
            wanted.append([sample.hidden for sample in original])
            left.append([sample.hidden for sample in given])


@dataclass
class _Pair:
    """A block on what the original and what the compressed blocks before it give.

    Attributes:
        seen: what the original gives to layers, by the name of the first layer that is given it, of each sample.
        groups: layers that are given the same, by the first of them, in the order of calls.
        adds: by layer, what its output is multiplied by before it is added to the hidden states.
        missing: hidden states of the original less those of the compressed model, of each sample.
    """

    lazy: LazyModel
    name: str
    block: nn.Module
    original: Sequence[Sample]
    given: Sequence[Sample]
    store: ActivationStore
    seen: dict[str, list[Held]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    adds: dict[str, float] = field(default_factory=dict)
    missing: list[Held] = field(default_factory=list)

    def original_outputs(self, matrices: Sequence[StoredMatrix]) -> list[Sample]:
        """Run the original on all samples, which `turns` needs, and give what the next block is given there."""
        layers = {key: layer for matrix in matrices for key, layer in matrix.modules.items()}
        if not self.given[0].skipped:
            self.groups = _groups(self.block, self.given[0].exact(), layers)
            self.adds = _additions(self.block, self.original[0].exact(), layers)
        leaders = {leader: layers[leader] for leader in self.groups}
        self.seen = {leader: [] for leader in leaders}

        def see(name: str, args: tuple[Any, ...], _: object) -> None:
            self.seen[name].append(self.store.put(cast(Tensor, args[0]).detach()))

        with self.lazy.computing(), hooked(leaders, see, before=True):
            outputs = next_inputs(self.block, self.original, self.store.put)
        if self.adds:
            pairs = zip(self.original, self.given, strict=True)
            self.missing = [self.store.put(first.hidden() - second.hidden()) for first, second in pairs]
        return outputs

    def turns(self, matrices: Sequence[StoredMatrix]) -> Iterator[LayerMoment]:
        """The matrices of each group in the order in which the block multiplies by them, then all others."""
        layers = {key: layer for matrix in matrices for key, layer in matrix.modules.items()}
        left = list(matrices)
        for leader, group in self.groups.items():
            own = [matrix for matrix in left if matrix.layers.keys() <= set(group)]
            left = [matrix for matrix in left if matrix not in own]
            if own:
                yield from self._group(leader, layers[leader], own)
        run = lambda: outputs_of(self.block, self.given)  # noqa: E731 - run once for every group of experts
        yield from moments_in_turn(self.lazy, self.name, left, run)

    def _group(self, leader: str, layer: nn.Module, matrices: Sequence[StoredMatrix]) -> Iterator[LayerMoment]:
        """The matrices that multiply what the leader is given: their moments, and what is to be matched."""
        adding = self.adds.get(leader, 0.0) if len(matrices) == 1 else 0.0
        weights = [_rows(matrix).clone() for matrix in matrices]
        sums = _Sums(weights[0], adding)
        for number, x in enumerate(self._inputs(leader, layer)):
            sums.add(x, self.seen[leader][number](), self.missing[number]() if adding else None)
            if adding:
                sums.kept.append(self.store.put(x))
        moment = sums.moment.whole()
        for matrix, weight in zip(matrices, weights, strict=True):
            target = sums.target(weight, moment)
            if target is not None and matrix.transposed:
                target = target.T.contiguous()
            yield LayerMoment(self.name, matrix, moment.cpu(), target)
        if adding and sums.matched:
            self._make_up(leader, adding, weights[0], _rows(matrices[0]), sums.kept)
        elif adding:
            self.adds = {}  # nobody knows any more what is missing

    def _inputs(self, leader: str, layer: nn.Module) -> Iterator[Tensor]:
        """What a layer is given in the block as it is, of each sample; nothing after it runs."""
        stop, inputs = EarlyStop([leader]), list[Tensor]()

        def see(name: str, args: tuple[Any, ...], _: object) -> None:
            inputs.append(cast(Tensor, args[0]).detach())
            stop.seen(name, inputs[-1])

        for sample in self.given:
            inputs.clear()
            with self.lazy.computing(), hooked({leader: layer}, see, before=True):
                for _ in outputs_of(self.block, [sample]):
                    stop.finished()
            yield inputs[0]

    def _make_up(self, leader: str, adding: float, before: Tensor, after: Tensor, kept: Sequence[Held]) -> None:
        """What is missing after a layer has added its output."""
        left = []
        for missing, wanted, x in zip(self.missing, self.seen[leader], kept, strict=True):
            added = wanted().float() @ before.T - x().float() @ after.T
            left.append(self.store.put(missing() + adding * added.reshape(missing().shape)))
        self.missing = left


class _Sums:
    """What the matrices that match are computed from: sums over all tokens.

    Attributes:
        moment: of what is given now, H = Σ x' x'ᵀ.
        kept: what is given now.
        matched: whether the same tokens were given in the original.
    """

    def __init__(self, weight: Tensor, adding: float) -> None:
        self.moment, self.kept, self.matched = SecondMoment(weight.shape[1], weight.device), list[Held](), True
        self._weight, self._adding = weight, adding
        self._lost = torch.zeros(len(weight) if adding else weight.shape[1], weight.shape[1], device=weight.device)

    def add(self, given: Tensor, wanted: Tensor, missing: Tensor | None) -> None:
        """Take what a layer is given now, and in the original, and what hidden states miss where it adds to them."""
        self.moment.add(given)
        self.matched = self.matched and wanted.shape == given.shape
        if self.matched:
            rows = given.reshape(-1, given.shape[-1]).float()
            far = wanted.reshape(rows.shape).float() - rows
            if missing is not None:
                far = far @ self._weight.T
                far += missing.reshape(far.shape).float() / self._adding
            self._lost.addmm_(far.T, rows)  # of inputs, or of the outputs of the one layer

    def target(self, weight: Tensor, moment: Tensor) -> Tensor | None:
        """W*, [O, I]; None where it is not known."""
        mean = float(moment.diagonal().double().mean())
        if not self.matched or not mean > 0:
            return None
        damped = moment.double()
        damped.diagonal().add_(RIDGE * mean)
        lost = self._lost if self._adding else weight @ self._lost
        made_up: Tensor = torch.linalg.solve(damped, lost.double(), left=False)
        return weight + made_up.float()


def _rows(matrix: StoredMatrix) -> Tensor:
    """[O, I] float32."""
    weight = matrix.weight.float()
    return weight.T.contiguous() if matrix.transposed else weight


@torch.no_grad()
def _groups(block: nn.Module, sample: Sample, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Layers that are given the same tensor, by the first of them; those that run once, on all tokens."""
    calls: dict[str, list[Tensor]] = {}

    def see(name: str, args: tuple[Any, ...], _: object) -> None:
        calls.setdefault(name, []).append(cast(Tensor, args[0]))

    with hooked(layers, see, before=True):
        hidden = sample.through(block)
    groups: dict[str, list[str]] = {}
    for name, (x, *again) in calls.items():
        if again or x.shape[:-1].numel() != hidden.shape[:-1].numel():
            continue
        leader = next((first for first in groups if calls[first][0] is x), name)
        groups.setdefault(leader, []).append(name)
    return groups


@torch.no_grad()
def _additions(block: nn.Module, sample: Sample, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """The layers that add to the hidden states, with factors; none where a block returns anything but such a sum.

    They are found by writing what the block adds as a sum of outputs of layers.
    """
    returned: dict[str, Tensor] = {}

    def see(name: str, _: object, output: Any) -> None:
        returned[name] = output

    with hooked(layers, see):
        after = sample.through(block)
    before = sample.hidden()
    same = {name: y for name, y in returned.items() if isinstance(y, Tensor) and y.shape == after.shape}
    if not same or after.shape != before.shape:
        return {}
    added = (after - before).reshape(-1, after.shape[-1])[:_TOKENS].double().flatten()
    outputs = torch.stack([y.reshape(-1, y.shape[-1])[:_TOKENS].double().flatten() for y in same.values()], 1)
    factors = torch.linalg.lstsq(outputs, added[:, None]).solution[:, 0]
    if float((outputs @ factors - added).norm()) > _EXACT * float(added.norm()):
        return {}
    return {name: float(factor) for name, factor in zip(same, factors, strict=True) if abs(float(factor)) > _ADDS}
