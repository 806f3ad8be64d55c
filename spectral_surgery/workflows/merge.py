"""merge: adapters into the weights of a checkpoint, shard by shard, with a record that takes them out again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
import zstandard
from torch import Tensor

from spectral_surgery import cards
from spectral_surgery.checkpoint.adapter_files import write_adapter
from spectral_surgery.checkpoint.companions import check_apart, copy_companions
from spectral_surgery.checkpoint.index import TensorInfo, read_index
from spectral_surgery.checkpoint.merge_record import (
    DATA_FILE,
    FOLDER,
    RECORD_FILE,
    MergedTensor,
    MergeRecord,
    adapter_folder,
)
from spectral_surgery.checkpoint.reader import CODES, DTYPES, read_bytes, read_tensor
from spectral_surgery.checkpoint.writer import Entry, publishing, tensor_bytes, write_checkpoint
from spectral_surgery.errors import NotMergeableError
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.surgery.merge import total_delta
from spectral_surgery.surgery.undo import digest, merge_weight
from spectral_surgery.workflows.facts import merged_facts
from spectral_surgery.workflows.merge_plan import MergePlan, Target, plan_merge, without_extra
from spectral_surgery.workflows.progress import Progress, silent

_PIECE = 1 << 24  # bytes of a copied tensor at a time


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layers: by tensor name, the size of the update relative to the weight: ‖ΔW‖ / ‖W‖.
        replaced: tensors replaced whole.
        tied: second name -> first name of tensors that were changed together.
        merged_bytes: of the weights that got an update.
        undo_bytes: what it costs to be able to take it back.
        seconds: wall time.
        peak_rss_bytes: largest resident size of this process.
    """

    layers: dict[str, float]
    replaced: tuple[str, ...]
    tied: dict[str, str]
    merged_bytes: int
    undo_bytes: int
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "layers": self.layers,
            "replaced": list(self.replaced),
            "tied": self.tied,
            "merged_bytes": self.merged_bytes,
            "undo_bytes": self.undo_bytes,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def merge(
    base: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
    origin: str | None = None,
    progress: Progress = silent,
) -> MergeReport:
    """Write the checkpoint in which the adapters are part of the weights; no model is built.

    Updates are added in float32 and cast once; everything else keeps its bits. Tied weights stay tied.

    Args:
        base: a plain checkpoint folder.
        adapters: folders with adapters.
        out: folder to create.
        weights: factor of each adapter; None for 1.
        overwrite: replace an existing folder.
        origin: the Hub repository that base is a copy of, for the model card.
        progress: called after each tensor.

    Returns:
        The report.

    Raises:
        ConfigError: when the numbers of adapters and weights differ.
        CheckpointError: when something is damaged, does not fit, or out is taken.
        NotMergeableError: when an adapter is not one weight update, or a sum is not finite.
    """
    started = time.perf_counter()
    for source in (base, *adapters):
        check_apart(source, out)
    plan = plan_merge(base, adapters, weights)
    with publishing(out, overwrite=overwrite) as folder:
        (folder / FOLDER).mkdir()
        with (folder / FOLDER / DATA_FILE).open("wb") as stream:
            work = _Work(plan, stream, progress)
            write_checkpoint(folder, work.entries())
            undo_bytes = stream.tell()
        copy_companions(plan.index, folder, plan.index.config)
        for number, state in enumerate(plan.states):
            if state.layers:
                write_adapter(without_extra(state), adapter_folder(folder, number))
        record = MergeRecord(plan.weights, work.tensors, plan.aliases)
        (folder / FOLDER / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
        if (folder / cards.FILE_NAME).is_file():
            shutil.copyfile(folder / cards.FILE_NAME, folder / FOLDER / cards.FILE_NAME)  # for unmerge
        cards.write_derived(folder, merged_facts(record, read_index(folder), origin))
    return MergeReport(
        work.sizes,
        tuple(sorted(plan.replaced)),
        {alias: name for alias, name in plan.aliases.items() if name in work.tensors},
        sum(target.info.nbytes for target in plan.targets.values()),
        undo_bytes,
        time.perf_counter() - started,
        peak_rss_bytes(),
    )


@dataclass(frozen=True)
class _Work:
    plan: MergePlan
    stream: BinaryIO
    progress: Progress
    tensors: dict[str, MergedTensor] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def entries(self) -> list[Entry]:
        """Of the merged checkpoint, by name."""
        plan = self.plan
        entries = {name: self._entry(name, name) for name in plan.index.tensors if name not in plan.aliases}
        entries |= {name: self._added(name) for name in plan.replaced if name not in plan.index.tensors}
        entries |= {alias: self._entry(alias, name) for alias, name in plan.aliases.items()}
        return [entries[name] for name in sorted(entries)]

    def _entry(self, as_name: str, name: str) -> Entry:
        info = self.plan.index.tensors[name]

        def chunks() -> Iterator[memoryview | bytearray]:
            if name in self.plan.replaced:
                yield tensor_bytes(self._replaced(as_name, name, info))
            elif name in self.plan.targets:
                yield tensor_bytes(self._merged(as_name, self.plan.targets[name]))
            else:
                for start in range(0, info.nbytes, _PIECE):
                    yield read_bytes(info, start, min(start + _PIECE, info.nbytes))
            self._advance(as_name)

        return Entry(as_name, info.dtype, info.shape, chunks)

    def _added(self, name: str) -> Entry:
        tensor = self.plan.replaced[name]

        def chunks() -> Iterator[memoryview]:
            self.tensors[name] = MergedTensor((), False, 1.0, self.stream.tell(), 0, None, digest(tensor))
            yield tensor_bytes(tensor)
            self._advance(name)

        return Entry(name, CODES[tensor.dtype], tuple(tensor.shape), chunks)

    def _merged(self, as_name: str, target: Target) -> Tensor:
        base = read_tensor(target.info)
        parts = [
            (self.plan.states[number].build(layer, *target.shape), self.plan.weights[number])
            for number, layer in target.sources
        ]
        delta = total_delta(parts, target.info.shape, transposed=target.transposed)
        merged, undo = merge_weight(base, delta, target.info.name)
        if as_name == target.info.name:
            offset = self.stream.tell()
            self.stream.write(undo.data)
            self.tensors[as_name] = MergedTensor(
                target.sources, target.transposed, undo.step, offset, len(undo.data), undo.base, undo.merged
            )
            self.sizes[as_name] = float(delta.norm() / base.double().norm().clamp_min(1e-300))
        return merged

    def _replaced(self, as_name: str, name: str, info: TensorInfo) -> Tensor:
        base, merged = read_tensor(info), self.plan.replaced[name].to(DTYPES[info.dtype])
        if not bool(torch.isfinite(merged).all()):
            raise NotMergeableError(f"{name}: is beyond the range of {info.dtype}; finite numbers are accepted.")
        if as_name == name:
            data, offset = zstandard.ZstdCompressor().compress(tensor_bytes(base)), self.stream.tell()
            self.stream.write(data)
            self.tensors[name] = MergedTensor((), False, 1.0, offset, len(data), digest(base), digest(merged))
        return merged

    def _advance(self, name: str) -> None:
        self.done.append(name)
        self.progress(len(self.done), len(self.plan.index.tensors), name)
