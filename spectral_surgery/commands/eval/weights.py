"""How far two checkpoints are apart, tensor by tensor, plain or compressed: read in pieces, never as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.checkpoint import is_compressed, open_compressed
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.reader import DTYPES, read_flat
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.progress import Progress

_PIECE = 1 << 22  # elements compared at a time


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from another: relative error in the Frobenius norm."""

    name: str
    shape: tuple[int, ...]
    relative_error: float


@dataclass(frozen=True)
class Distance:
    """How far two checkpoints are apart."""

    tensors: tuple[TensorError, ...] = ()
    equal: int = 0
    relative_error: float = 0.0
    only_in_one: tuple[str, ...] = ()


def distance(a: Checkpoint, b: Checkpoint, progress: Progress) -> Distance:
    """Compare the tensors of two checkpoints.

    Raises:
        CheckpointError: when they have no tensor in common, or one of other shapes.
    """
    left, right = _Dense(a), _Dense(b)
    common = sorted(left.shapes.keys() & right.shapes.keys())
    if not common:
        raise CheckpointError(f"{a} and {b}: expected versions of one model, got no tensor of the same name.")
    wrong = [name for name in common if left.shapes[name] != right.shapes[name]]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{name}: expected equal shapes, got {list(left.shapes[name])} in {a} and"
            f" {list(right.shapes[name])} in {b}."
        )
    errors, error, energy = [], 0.0, 0.0
    for place, name in enumerate(common, 1):
        own_error = own_energy = 0.0
        for x, y in zip(left.pieces(name), right.pieces(name), strict=True):
            own_error += float((x.double() - y.double()).square().sum())
            own_energy += float(x.double().square().sum())
        if own_error:
            relative = math.sqrt(own_error / own_energy) if own_energy else math.inf
            errors.append(TensorError(name, left.shapes[name], relative))
            error, energy = error + own_error, energy + own_energy
        progress(place, len(common), name)
    errors.sort(key=lambda tensor: -tensor.relative_error)
    total = math.sqrt(error / energy) if energy else 0.0
    apart = tuple(sorted(left.shapes.keys() ^ right.shapes.keys()))
    return Distance(tuple(errors), len(common) - len(errors), total, apart)


class _Dense:
    """A checkpoint, plain or compressed, read in pieces of equal size on both sides."""

    def __init__(self, source: Checkpoint) -> None:
        self._compressed = open_compressed(source) if is_compressed(source) else None
        self._index: CheckpointIndex = self._compressed.index if self._compressed else read_index(source)
        self.shapes = {name: info.shape for name, info in self._index.tensors.items() if info.dtype in DTYPES}
        if self._compressed:
            manifest = self._compressed.manifest
            self.shapes = {name: shape for name, shape in self.shapes.items() if ".spectral_" not in name}
            self.shapes |= {name: record.shape for name, record in manifest.tensors.items()}
            self.shapes |= {alias: self.shapes[name] for alias, name in manifest.aliases.items()}

    def pieces(self, name: str) -> Iterator[Tensor]:
        manifest = self._compressed.manifest if self._compressed else None
        name = manifest.aliases.get(name, name) if manifest else name
        if self._compressed and manifest and name in manifest.tensors:
            rest = torch.empty(0)
            for part in range(len(manifest.tensors[name].parts)):
                rest = torch.cat([rest, self._compressed.part(name, part).to_dense().reshape(-1)])
                while len(rest) >= _PIECE:
                    yield rest[:_PIECE]
                    rest = rest[_PIECE:]
            if len(rest):
                yield rest
            return
        info = self._index.tensors[name]
        for start in range(0, info.numel, _PIECE):
            yield read_flat(info, start, min(start + _PIECE, info.numel))
