"""What every target of a model is: settings, a plan that is checked before anything is written, and its writer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.compressed.dense import DenseCheckpoint
from spectral_surgery.files.reader import read_flat
from spectral_surgery.progress import Progress


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor in another format.

    Attributes:
        name: as the checkpoint has it.
        stored_as: the type it has there.
        shape: sizes.
        nbytes: that it takes there.
        compressed_error: relative error of the compressed folder against its original; None for a plain checkpoint.
        export_error: relative error of the export against the weights that were exported.
        total_error: relative error of the export against the original; None where that was not given.
    """

    name: str
    stored_as: str
    shape: tuple[int, ...]
    nbytes: int
    compressed_error: float | None
    export_error: float
    total_error: float | None

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class ModelExport:
    """What was exported.

    Attributes:
        target: row of TARGETS.
        tensors: those that were converted, with errors as measured.
        kept: reason by name of every tensor that keeps its values.
        files: what was written that holds weights.
        stored_bytes: of these files.
        export_error: relative error of all converted tensors together against what was exported.
        total_error: relative error against the original; None where that was not given.
        notes: what to know before it is used.
        seconds: wall time.
    """

    target: str
    tensors: tuple[ExportedTensor, ...]
    kept: Mapping[str, str]
    files: tuple[str, ...]
    stored_bytes: int
    export_error: float
    total_error: float | None
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "kept": dict(self.kept),
            "files": list(self.files),
            "notes": list(self.notes),
        }


class ModelPlan(Protocol):
    """An export that was checked, and not begun."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before the result is used."""
        ...

    @property
    def kept(self) -> Mapping[str, str]:
        """Reason by name of every tensor that keeps its values."""
        ...

    @property
    def converted(self) -> Mapping[str, str]:
        """Type in the new format by name of every other tensor."""
        ...

    def write(self, folder: Path, measure: Measure, progress: Progress) -> list[Path]:
        """Write weights and configuration into a folder.

        Returns the files with weights.

        Args:
            folder: an existing one.
            measure: is told of every converted tensor.
            progress: called after each tensor.
        """
        ...


@dataclass(frozen=True)
class ModelTarget:
    """One row of TARGETS.

    Attributes:
        name: how users choose it.
        config: a dataclass of its settings.
        plan: checkpoint and settings to a plan; raises where the format cannot hold something.
        help: what reads it, in one line.
    """

    name: str
    config: type[Any]
    plan: Callable[[DenseCheckpoint, Any], ModelPlan]
    help: str


@dataclass
class _Sums:
    energy: float = 0.0
    error: float = 0.0
    original: float = 0.0
    total: float = 0.0

    def add(self, other: _Sums) -> None:
        self.energy += other.energy
        self.error += other.error
        self.original += other.original
        self.total += other.total


@dataclass
class Measure:
    """Errors of the tensors of an export, added up as they are written.

    Attributes:
        source: what is exported.
        original: what source was compressed from; None where that was not given.
        tensors: finished ones.
    """

    source: DenseCheckpoint
    original: DenseCheckpoint | None = None
    tensors: list[ExportedTensor] = field(default_factory=list)
    _all: _Sums = field(default_factory=_Sums)
    _now: _Sums = field(default_factory=_Sums)

    def rows(self, name: str, first: int, before: Tensor, after: Tensor) -> None:
        """Count rows of a tensor.

        Args:
            name: of the tensor.
            first: the number of the first row.
            before: [N, I] weights that were exported.
            after: [N, I] what the export stands for.
        """
        before, now = before.double(), self._now
        now.energy += float(before.square().sum())
        now.error += float((after.double() - before).square().sum())
        if self.original is not None:
            there = self._original(name, first, len(before)).double()
            now.original += float(there.square().sum())
            now.total += float((after.double() - there).square().sum())

    def finish(self, name: str, stored_as: str, nbytes: int) -> None:
        """Close a tensor of which all rows were counted."""
        tensor, now = self.source.tensors[name], self._now
        ours = tensor.record.report.relative_error if tensor.record else None
        total = None if self.original is None else _root(now.total, now.original)
        error = _root(now.error, now.energy)
        self.tensors.append(ExportedTensor(name, stored_as, tensor.shape, nbytes, ours, error, total))
        self._all.add(now)
        self._now = _Sums()

    @property
    def export_error(self) -> float:
        """Of all tensors together, against what was exported."""
        return _root(self._all.error, self._all.energy)

    @property
    def total_error(self) -> float | None:
        """Of all tensors together, against the original."""
        return None if self.original is None else _root(self._all.total, self._all.original)

    def _original(self, name: str, first: int, rows: int) -> Tensor:
        original = self.original
        info = original.index.tensors.get(name) if original else None
        shape = self.source.tensors[name].shape
        if info is None or info.shape != shape:
            raise CheckpointError(
                f"{name}: the original has no such tensor of shape {shape}; expected the checkpoint"
                " that was compressed. Give another --base, or none."
            )
        return read_flat(info, first * shape[-1], (first + rows) * shape[-1]).reshape(rows, -1)


def _root(error: float, energy: float) -> float:
    return math.sqrt(error / energy) if energy else 0.0
