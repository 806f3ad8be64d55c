"""merge: adapters into the weights of a checkpoint, shard by shard, with a record that takes them out again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.checkpoints import merged_card
from spectral_surgery.commands.merge.plan import MergePlan, Patch, Target, plan_merge, without_extra
from spectral_surgery.commands.merge.update import change_of
from spectral_surgery.errors import NotMergeableError
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.index import read_index
from spectral_surgery.files.merge_record import (
    CONFIG_FILE,
    DATA_FILE,
    FOLDER,
    RECORD_FILE,
    Coding,
    MergedTensor,
    MergeRecord,
    adapter_folder,
    compressed,
)
from spectral_surgery.files.peft.adapter_files import write_adapter
from spectral_surgery.files.reader import CODES, read_tensor
from spectral_surgery.files.sidecar_files import check_apart, copy_companions
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.files.writer import Entry, copy_entry, reported, tensor_bytes, weights_name, write_checkpoint
from spectral_surgery.hf.tensor_names import as_rows
from spectral_surgery.live.undo import digest, merge_weight
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.progress import Progress, silent


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layers: by tensor name, the size of the update relative to the weight: ‖ΔW‖ / ‖W‖.
        tied: name -> name of parameters that are one and changed together, such as an output layer and an embedding.
        untied: parameters that were one and are different tensors now; the configuration says so.
        resized: rows before and after, by parameter; the configuration says so.
        merged_bytes: of the weights that got an update.
        undo_bytes: what it costs to be able to take it back.
    """

    layers: dict[str, float]
    replaced: tuple[str, ...]
    tied: dict[str, str]
    untied: tuple[str, ...]
    resized: dict[str, tuple[int, int]]
    merged_bytes: int
    undo_bytes: int
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        resized = {name: list(rows) for name, rows in self.resized.items()}
        return vars(self) | {"replaced": list(self.replaced), "untied": list(self.untied), "resized": resized}


def merge(
    base: Checkpoint,
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
        weights: factor of each adapter; None for 1.

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
            write_checkpoint(folder, work.entries(), name=weights_name(plan.index))
            undo_bytes = stream.tell()
        copy_companions(plan.index, folder, plan.config)
        record = _write_record(plan, work.tensors, folder)
        if (folder / cards.FILE_NAME).is_file():
            shutil.copyfile(folder / cards.FILE_NAME, folder / FOLDER / cards.FILE_NAME)  # for unmerge
        cards.write_derived(folder, merged_card(record, read_index(folder), origin))
    return MergeReport(
        work.sizes,
        plan.replaced,
        plan.tied,
        plan.untied,
        plan.resized,
        sum(target.info.nbytes for target in plan.targets.values() if target.info and target.sources),
        undo_bytes,
        time.perf_counter() - started,
        peak_rss_bytes(),
    )


def _write_record(plan: MergePlan, tensors: dict[str, MergedTensor], folder: Path) -> MergeRecord:
    """Write what unmerge needs beside the coded tensors."""
    if plan.config != plan.index.config:
        shutil.copyfile(plan.index.root / CONFIG_FILE, folder / FOLDER / CONFIG_FILE)
    used = {source.number for tensor in tensors.values() for source in tensor.sources}
    for number in used:
        write_adapter(without_extra(plan.states[number]), adapter_folder(folder, number))
    record = MergeRecord(plan.weights, tensors, plan.aliases)
    (folder / FOLDER / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
    return record


@dataclass(frozen=True)
class _Work:
    plan: MergePlan
    stream: BinaryIO
    progress: Progress
    tensors: dict[str, MergedTensor] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)

    def entries(self) -> list[Entry]:
        """Of the merged checkpoint, by name."""
        names = {name: self.plan.aliases.get(name, name) for name in (*self.plan.index.tensors, *self.plan.targets)}
        return reported([self._entry(name, names[name]) for name in sorted(names)], self.progress)

    def _entry(self, as_name: str, name: str) -> Entry:
        target = self.plan.targets.get(name)
        if target is None:
            return copy_entry(self.plan.index.tensors[name], as_name)
        dtype = target.info.dtype if target.info else CODES[target.replaced[0].values.dtype]
        return Entry(as_name, dtype, target.shape, lambda: [tensor_bytes(self._changed(as_name, name, target))])

    def _changed(self, as_name: str, name: str, target: Target) -> Tensor:
        base = read_tensor(target.info) if target.info else None
        start = _patched(base, target.replaced, name)
        merged, data, step = start, b"", 1.0
        if target.sources:
            states, weights = dict(enumerate(self.plan.states)), self.plan.weights
            change = change_of(target.sources, states, weights, start.shape, base=start)
            merged, undo = merge_weight(start, change.delta, name, change.scale)
            data, step = b"".join(tensor_bytes(factor) for factor in change.factors) + undo.data, undo.step
            if as_name == name:
                moved = torch.linalg.vector_norm(merged.double() - start.double())
                self.sizes[name] = float(moved / start.double().norm().clamp_min(1e-300))
        merged = _patched(merged, target.rows, name)
        if as_name == name:
            known = base if name in self.plan.index.tensors else None
            self._record(name, target, (known, merged), (data, step))
        return merged

    def _record(
        self, name: str, target: Target, both: tuple[Tensor | None, Tensor], coded: tuple[bytes, float]
    ) -> None:
        (base, merged), (data, step) = both, coded
        plain = not (target.replaced or target.rows)
        coding: Coding = "update" if plain and data and base is not None else "xor"
        shape = None
        if base is not None and coding == "xor":
            if base.shape != merged.shape:
                coding, shape = "whole", tuple(base.shape)
            data = compressed(base, merged if coding == "xor" else None)
        elif base is None:
            coding, data = "whole", b""
        sources = target.sources if coding == "update" else ()
        before, after = None if base is None else digest(base), digest(merged)
        offset, step = self.stream.tell(), step if sources else 1.0
        self.stream.write(data)
        self.tensors[name] = MergedTensor(sources, coding, step, offset, len(data), before, after, shape)


def _patched(tensor: Tensor | None, patches: Sequence[Patch], name: str) -> Tensor:
    """A tensor with rows of it, or all of it, replaced; in its dtype where there is one before."""
    made = tensor if tensor is not None else patches[0].values
    for patch in patches:
        values = patch.values.to(made.dtype)
        if not bool(torch.isfinite(values).all()):
            raise NotMergeableError(
                f"{name}: expected finite numbers, got one beyond the range of {CODES[made.dtype]}."
            )
        if not patch.spans:
            made = values
            continue
        made = made.mT.contiguous() if patch.turned else made.clone()
        rows, matrix = as_rows(values), as_rows(made)
        for row, stored, count in patch.spans:
            matrix[stored : stored + count] = rows[row : row + count]
        made = made.mT.contiguous() if patch.turned else made
    return made
