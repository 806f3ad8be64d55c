"""A checkpoint as a baseline would leave it: every matrix that a compression takes, rounded or pruned instead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from spectral_surgery.baselines import Baseline, BaselineResult
from spectral_surgery.calibration.layer_moments import layer_moments, model_and_inputs
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.plan import make_plan
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.header import TensorInfo
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.files.sidecar_files import copy_companions
from spectral_surgery.files.writer import Entry, copy_entry, tensor_bytes, weights_name, write_checkpoint
from spectral_surgery.text.settings import TextData


@dataclass(frozen=True)
class CompressedSubset:
    """The matrices of a checkpoint that are compressed.

    Attributes:
        shapes: (rows, columns) of each tensor seen as a matrix, by its name.
        aliases: second name of a tied tensor -> name in shapes; its bytes count once.
    """

    shapes: Mapping[str, tuple[int, int]]
    aliases: Mapping[str, str]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Cost:
    """What a checkpoint takes, and what it lost.

    Attributes:
        bits_per_weight: of the matrices that are compressed, everything counted.
        nbytes: of all tensors; tied ones once.
        relative_error: of those matrices, Frobenius norm.
    """

    bits_per_weight: float
    nbytes: int
    relative_error: float


def matrices_of(index: CheckpointIndex, compressed: CompressedCheckpoint | None) -> CompressedSubset:
    """What baselines are applied to: what a compressed checkpoint compresses, or what `compress` would."""
    if compressed is not None:
        records = compressed.manifest.tensors
        shapes = {name: record.matrix for name, record in records.items() if name in index.tensors}
        return CompressedSubset(shapes, {a: n for a, n in compressed.manifest.aliases.items() if a in index.tensors})
    plan = make_plan(index, CompressOptions(Target("bits", 4.0)))
    return CompressedSubset({tensor.info.name: (tensor.rows, tensor.columns) for tensor in plan.tensors}, plan.aliases)


def plain_cost(index: CheckpointIndex, matrices: CompressedSubset, relative_error: float) -> Cost:
    """What a plain checkpoint takes."""
    stored = sum(index.tensors[name].nbytes for name in matrices.shapes if name in index.tensors)
    return Cost(8 * stored / max(matrices.weights, 1), _rest(index, matrices) + stored, relative_error)


def write_baseline(
    index: CheckpointIndex,
    matrices: CompressedSubset,
    baseline: Baseline,
    bits: float | None,
    folder: Path,
    *,
    quantised: Mapping[str, BaselineResult] = MappingProxyType({}),
) -> Cost:
    """Write a checkpoint whose matrices are decoded from a baseline, in float32."""
    stored: dict[str, int] = {}
    lost, energy = [], []

    def entry(info: TensorInfo) -> Entry:
        name = matrices.aliases.get(info.name, info.name)
        if name not in matrices.shapes:
            return copy_entry(info)

        def chunks() -> Iterator[memoryview]:
            weight = read_tensor(info).float()
            nbytes, ours = 0, quantised.get(name)
            for block in _blocks(weight, matrices.shapes[name]):
                result = ours or _applied(info.name, baseline, block, bits)
                nbytes += result.stored_bytes
                if name not in stored:
                    lost.append(float((block - result.weight).double().square().sum()))
                    energy.append(float(block.double().square().sum()))
                yield tensor_bytes(result.weight)
            stored[name] = nbytes

        return Entry(info.name, "F32", info.shape, chunks)

    write_checkpoint(folder, [entry(info) for info in index.tensors.values()], name=weights_name(index))
    copy_companions(index, folder, index.config)
    total = sum(stored.values())
    error = math.sqrt(sum(lost) / sum(energy)) if sum(energy) else 0.0
    return Cost(8 * total / max(matrices.weights, 1), _rest(index, matrices) + total, error)


def calibrated_weights(
    source: Path,
    index: CheckpointIndex,
    names: Mapping[str, object],
    data: TextData,
    baseline: Baseline,
    *,
    bits: float | None = None,
) -> dict[str, BaselineResult]:
    """Compress the linear layers in a model's blocks; what is not in a block has no inputs to go by.

    Raises:
        ConfigError: when the baseline cannot have the rate; the tensor is named.
    """
    results = {}
    matrices = [name for name in names if len(index.tensors[name].shape) == 2]
    for turn in layer_moments(*model_and_inputs(source, index, data), matrices):
        weight = turn.matrix.weight.float()
        result = _applied(turn.tensor, baseline, weight.T if turn.transposed else weight, bits, turn.moment)
        dense = result.weight.T.contiguous() if turn.transposed else result.weight
        turn.matrix.put(dense)
        results[turn.tensor] = BaselineResult(dense, result.stored_bytes)
    return results


def _applied(
    name: str, baseline: Baseline, weight: Tensor, bits: float | None, moment: Tensor | None = None
) -> BaselineResult:
    try:
        return baseline.apply(weight, bits, moment)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _blocks(weight: Tensor, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """The matrices of a tensor: itself, or one of each expert."""
    rows, columns = shape
    fused = weight.ndim > 2 and rows > weight.shape[0]
    return torch.split(weight.reshape(rows, columns), weight.shape[-2] if fused else rows)


def _rest(index: CheckpointIndex, matrices: CompressedSubset) -> int:
    ours = {*matrices.shapes, *matrices.aliases}
    return sum(info.nbytes for name, info in index.tensors.items() if name not in ours)
