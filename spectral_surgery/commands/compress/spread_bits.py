"""What one more bit would help in each tensor, measured on some text: the first pass of compress --calibrate.

The blocks are run once forwards, which gives the second moments of what layers are given and thereby the error that a
rate leaves in their outputs, and once backwards, which gives what such errors do to the last hidden states. Of several
stacks each has separate last hidden states, and counts as much as the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel
from spectral_surgery.calibration.layer_moments import BATCH_TOKENS, IN_MEMORY, model_and_inputs
from spectral_surgery.calibration.sensitivity import gradient_squares, probe, pull_back
from spectral_surgery.calibration.stored_layers import StoredMatrix, matrices_of
from spectral_surgery.codec.allocation import TensorCost, spread_bits, spread_density
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.feedback import feedback_noise
from spectral_surgery.codec.rate import Target
from spectral_surgery.files.atomic import replace_file
from spectral_surgery.files.compressed.plan import Plan
from spectral_surgery.files.compressed.units import UnitStore
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.peft.task import task_of
from spectral_surgery.inputs.model_input import EqualShapes, equal_shapes, spaced
from spectral_surgery.live.blocks import Held, Sample, UnchainedError, next_inputs
from spectral_surgery.live.heads import word_table
from spectral_surgery.live.hooks import hooked
from spectral_surgery.live.moments import moments_of
from spectral_surgery.memory import release_freed_memory
from spectral_surgery.text.settings import TextData

_TOKENS = 1 << 13  # of text that costs are measured on
REACH = 3.0  # bits that a tensor may be from the mean, and powers of two of its density
_RATES = "rates.json"
HEADS = ("lm_head.weight", "embed_out.weight")

_Block = tuple[str, nn.Module, list[StoredMatrix]]  # name with its dot, the block, what its layers multiply by


def spread_targets(
    source: Path, index: CheckpointIndex, plan: Plan, data: TextData, store: UnitStore, *, device: str = "cpu"
) -> dict[str, Target]:
    """Targets of single tensors that together give what was asked of all; where a cost is unknown, none."""
    file, kind = store.folder / _RATES, plan.options.target.kind
    body = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if body.get("key") != store.key:
        shares = measure_shares(source, index, plan, data, device=device, folder=store.folder)
        spread = spread_density if kind == "density" else spread_bits
        body = {"key": store.key, "rates": spread(shares, plan.options.target.value, REACH)}
        replace_file(file, json.dumps(body).encode())
    return {name: Target(kind, rate) for name, rate in body["rates"].items()}


def measure_shares(
    source: Path, index: CheckpointIndex, plan: Plan, data: TextData, *, device: str = "cpu", folder: Path | None = None
) -> dict[str, TensorCost]:
    """The cost of the weights of each tensor, in squared relative errors of the last hidden states.

    Returns by name, of the linear layers in blocks, of embeddings, and of the output layer of a language model; none
    for a model without a list of blocks, or that changes hidden states between them.
    """
    lazy, inputs = model_and_inputs(source, index, data, device)
    if not lazy.chain.stacks:
        return {}
    writes = task_of(index.config) in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    batches = equal_shapes(spaced(inputs, _TOKENS), BATCH_TOKENS, lazy.device)
    with closing(ActivationStore(IN_MEMORY, folder)) as store, suppress(UnchainedError):
        return _Measurement(index, plan, lazy, store).run(batches, writes=writes)
    return {}


@dataclass(frozen=True)
class _Measurement:
    index: CheckpointIndex
    plan: Plan
    lazy: LazyModel
    store: ActivationStore

    def run(self, batches: EqualShapes, *, writes: bool) -> dict[str, TensorCost]:
        sizes, costs = {tensor.info.name: tensor.info.numel for tensor in self.plan.tensors}, dict[str, float]()
        ends: list[list[Held]] = []
        tokens: list[int] = []
        for number in range(len(self.lazy.chain.stacks)):
            blocks = self._blocks(number)
            samples, errors, tables = self._forwards(number, blocks, batches, ends)
            gradients, entered = self._backwards(blocks, samples)
            ends.append([sample.hidden for sample in samples[-1]])
            tokens.append(sum(end().shape[:-1].numel() for end in ends[-1]))
            costs = {name: cost * tokens[-1] / tokens[max(0, number - 1)] for name, cost in costs.items()}
            for name, error in errors.items():
                costs[name] = costs.get(name, 0.0) + error * gradients.get(name, 0.0)
            for name, part in tables.items():
                costs[name] = costs.get(name, 0.0) + part * entered / sizes[name]
        if writes:  # an error of the output layer is as bad as one of the same part of what it is given
            head = next((name for name in HEADS if name in sizes), self._words())
            costs[head] = costs.get(head, 0.0) + tokens[-1] / sizes.get(head, 1)
        return {
            name: TensorCost(sizes[name], cost) for name, cost in costs.items() if name in sizes and 0 < cost < math.inf
        }

    def _words(self) -> str:
        words = word_table(self.lazy.model)
        return next((name for name, module in self._tables() if module is words), "")

    def _tables(self) -> Iterator[tuple[str, nn.Embedding]]:
        """Embeddings by name of the tensor."""
        for name, module in self.lazy.model.named_modules():
            info = self.lazy.names.tensor(f"{name}.weight") if isinstance(module, nn.Embedding) else None
            if info is not None:
                yield info.name, module

    def _entering(self) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """What is compressed outside of the blocks, by tensor: convolutions, and parameters that are added or read."""
        planned = {tensor.info.name for tensor in self.plan.tensors}
        convolutions, vectors = dict[str, nn.Module](), dict[str, str]()
        for path, _ in self.lazy.model.named_parameters():
            info, owner = self.lazy.names.tensor(path), self.lazy.model.get_submodule(path.rpartition(".")[0])
            if info is None or info.name not in planned or path.startswith(self.lazy.chain.prefixes):
                continue
            if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                convolutions[info.name] = owner
            elif not isinstance(owner, nn.Linear):
                vectors[info.name] = path
        return convolutions, vectors

    def _blocks(self, number: int) -> list[_Block]:
        stack = self.lazy.chain.stacks[number]
        planned = {tensor.info.name for tensor in self.plan.tensors if 1 in tensor.axes}
        named = [(f"{stack.prefix}.{place}.", block) for place, block in enumerate(stack.blocks)]
        return [(name, block, matrices_of(self.lazy.names, planned, name, block)) for name, block in named]

    def _forwards(
        self, number: int, blocks: Sequence[_Block], batches: EqualShapes, before: Sequence[Sequence[Held]]
    ) -> tuple[list[list[Sample]], dict[str, float], dict[str, float]]:
        """What each block of a stack is given, and what the last one returns; errors of outputs; parts of what enters.

        The errors are by tensor, squared, those at no bits, over all tokens, a weight; the parts are of the energy of
        all embeddings, and outputs of convolutions before the first block, that are compressed.
        """
        power: dict[str, float] = {}
        convolutions, vectors = self._entering()

        def see(name: str, _: object, output: Tensor) -> None:
            power[name] = _power(output)

        with self.lazy.chain.outside(number), self.lazy.computing(), hooked(convolutions, see):
            samples = [self.lazy.chain.enter(number, batches, before, self.store.put)]
            power |= {name: _power(self.lazy.model.get_parameter(path)) for name, path in vectors.items()}
        errors: dict[str, float] = {}
        for name, block, matrices in blocks:
            with self.lazy.holding(name):
                with self.lazy.computing(), moments_of(_layers(matrices)) as moments:
                    samples.append(next_inputs(block, samples[-1], self.store.put))
                for matrix in matrices:
                    seen = [moments[key] for key in matrix.layers if key in moments]
                    if seen:
                        noise = feedback_noise(seen[0].cpu(), self._basis(matrix.tensor))
                        errors[matrix.tensor] = _power(matrix.weight) * noise
                        del seen
                        release_freed_memory()
        return samples, errors, {name: part / (sum(power.values()) or 1.0) for name, part in power.items()}

    def _backwards(
        self, blocks: Sequence[_Block], samples: Sequence[Sequence[Sample]]
    ) -> tuple[dict[str, float], float]:
        """By tensor, the mean square of the gradient with regard to an output of the layer; the cost of what enters.

        That is what comes of an error as large as the hidden states that the first block is given.
        """
        generator = torch.Generator().manual_seed(0)
        gradients = [self.store.put(probe(sample.hidden(), generator)) for sample in samples[-1]]
        means: dict[str, float] = {}
        for (name, block, matrices), inputs in zip(reversed(blocks), reversed(samples[:-1]), strict=True):
            watched = gradient_squares(_layers(matrices))
            with self.lazy.holding(name), self.lazy.computing(), watched as squares:
                release_freed_memory()
                pulled = (pull_back(block, sample, after()) for sample, after in zip(inputs, gradients, strict=True))
                gradients = [self.store.put(gradient) for gradient in pulled]
            for matrix in matrices:
                seen = [squares[key] for key in matrix.layers if key in squares]
                if seen:
                    means[matrix.tensor] = sum(one.total for one in seen) / max(sum(one.count for one in seen), 1)
        entered = 0.0
        for sample, waiting in zip(samples[0], gradients, strict=True):
            gradient = waiting()
            squared = gradient.double().square().sum(-1) * sample.hidden().double().square().sum(-1)
            entered += float(squared.sum()) / gradient.shape[-1]
        return means, entered

    def _basis(self, tensor: str) -> Basis:
        axes = next(planned.axes for planned in self.plan.tensors if planned.info.name == tensor)
        return Basis(self.plan.options.transform, self.plan.options.tile, axes)


def _layers(matrices: Sequence[StoredMatrix]) -> dict[str, nn.Module]:
    return {key: layer for matrix in matrices for key, layer in matrix.modules.items()}


def _power(weight: Tensor) -> float:
    """Mean square."""
    return float(torch.linalg.vector_norm(weight)) ** 2 / weight.numel()
