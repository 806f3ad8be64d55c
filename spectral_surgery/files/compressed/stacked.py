"""Many small matrices of one shape, decoded as one stack: for each by itself the calls would take most of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from spectral_surgery.codec.parallel import one_torch_thread
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.manifest import SUFFIXES

_SMALL = 1 << 15  # weights of a matrix, at most
_STACK = 1 << 18  # weights that are decoded at a time


@dataclass(frozen=True)
class Stacks:
    """The small matrices of a checkpoint, for whoever wants them in the order of their names."""

    checkpoint: CompressedCheckpoint
    _ready: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str) -> Tensor | None:
        """A small matrix: [O, I] float32, and those that follow are decoded with it; None for any other tensor.

        Raises CheckpointError when one of the stack is damaged.
        """
        names = self._stack_of.get(name)
        if names is not None and name not in self._ready:
            self._ready.update(zip(names, self._decoded(names), strict=True))
        return self._ready.pop(name, None)

    @cached_property
    def _stack_of(self) -> dict[str, Sequence[str]]:
        alike: dict[object, list[str]] = {}
        for name, record in sorted(self.checkpoint.manifest.tensors.items()):
            if len(record.parts) == 1 == record.parts[0].frames and record.matrix[0] * record.matrix[1] <= _SMALL:
                steps = self.checkpoint.index.tensors[f"{name}.{SUFFIXES[2]}"].shape
                alike.setdefault((record.matrix, record.basis(0), steps), []).append(name)
        stacks: dict[str, Sequence[str]] = {}
        for names in alike.values():
            record = self.checkpoint.manifest.tensors[names[0]]
            count = _STACK // (record.matrix[0] * record.matrix[1])
            for start in range(0, len(names), count):
                some = names[start : start + count]
                stacks |= dict.fromkeys(some, some)
        return stacks

    def _decoded(self, names: Sequence[str]) -> Tensor:
        """[n, O, I] float32; each as `EncodedSpectrum.to_dense` gives it."""
        checkpoint = self.checkpoint.with_parts(names)
        parts = [checkpoint.part(name, 0) for name in names]
        with torch.inference_mode(False), one_torch_thread():
            values = torch.empty(len(parts), *parts[0].shape)
            for one, part in zip(values, parts, strict=True):
                one.copy_(part.codes(0))
            offsets = torch.tensor([part.offset for part in parts])
            if bool(offsets.any()):
                values += torch.sign(values) * offsets[:, None, None]
            return parts[0].basis.inverse(values.mul_(torch.stack([part.step for part in parts])[:, None]))
