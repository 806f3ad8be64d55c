"""unmerge: the base of a merged checkpoint, bit for bit, or a refusal."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.cards import card as cards
from spectral_surgery.commands.merge.update import Change, change_of, factor_sizes
from spectral_surgery.errors import UnmergeError
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.index import CheckpointIndex, TensorInfo, read_index
from spectral_surgery.files.merge_record import (
    CONFIG_FILE,
    FOLDER,
    MergedTensor,
    MergeRecord,
    adapter_folder,
    decompressed,
    read_data,
    read_record,
)
from spectral_surgery.files.peft.adapter_files import read_adapter
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.files.sidecar_files import check_apart, copy_companions
from spectral_surgery.files.writer import Entry, copy_entry, reported, tensor_bytes, weights_name, write_checkpoint
from spectral_surgery.live.undo import Undo, digest, unmerge_weight
from spectral_surgery.progress import Progress, silent


@dataclass(frozen=True)
class UnmergeReport:
    """What an unmerge did.

    Attributes:
        restored: tensors whose bits were restored and checked.
        dropped: tensors that the base does not have.
    """

    restored: tuple[str, ...]
    dropped: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {"restored": list(self.restored), "dropped": list(self.dropped)}


def unmerge(merged: Path, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> UnmergeReport:
    """Write the checkpoint that `merge` started from; every restored tensor has the checksum it had then.

    Raises:
        UnmergeError: when nothing was merged, or a tensor or the record was changed since; nothing is written then.
        CheckpointError: when the folder is damaged, or out is taken.
    """
    started = time.perf_counter()
    check_apart(merged, out)
    record = read_record(merged)
    index = read_index(merged)
    missing = [name for name in record.tensors if name not in index.tensors]
    if missing:
        raise UnmergeError(
            f"{merged}: expected the folder that merge wrote, got one without {', '.join(missing)}, which was merged"
            " into."
        )
    used = sorted({source.number for tensor in record.tensors.values() for source in tensor.sources})
    work = _Work(record, index, {number: read_adapter(adapter_folder(merged, number)) for number in used}, progress)
    plain = replace(index, other_files=tuple(path for path in index.other_files if path.parts[0] != FOLDER))
    with publishing(out, overwrite=overwrite) as folder:
        write_checkpoint(folder, work.entries(), name=weights_name(index))
        copy_companions(plain, folder, plain.config)
        if (merged / FOLDER / CONFIG_FILE).is_file():
            shutil.copyfile(merged / FOLDER / CONFIG_FILE, folder / CONFIG_FILE)
        _restore_card(merged, folder)
    dropped = tuple(name for name, tensor in record.tensors.items() if tensor.base is None)
    restored = tuple(name for name in record.tensors if name not in dropped)
    return UnmergeReport(restored, dropped, time.perf_counter() - started)


def _restore_card(merged: Path, folder: Path) -> None:
    saved, card = merged / FOLDER / cards.FILE_NAME, folder / cards.FILE_NAME
    if saved.is_file():
        shutil.copyfile(saved, card)
    elif cards.has_section(cards.read_card(folder) or ""):
        card.unlink()  # the base had none


@dataclass(frozen=True)
class _Work:
    record: MergeRecord
    index: CheckpointIndex
    states: dict[int, AdapterState]
    progress: Progress

    def entries(self) -> list[Entry]:
        """Of the base."""
        added = {name for name, tensor in self.record.tensors.items() if tensor.base is None}
        names = [name for name in self.index.tensors if name not in added]
        return reported([self._entry(name) for name in names], self.progress)

    def _entry(self, as_name: str) -> Entry:
        info = self.index.tensors[as_name]
        tensor = self.record.tensors.get(self.record.aliases.get(as_name, as_name))
        if tensor is None:
            return copy_entry(info)
        shape = info.shape if tensor.shape is None else tensor.shape
        return Entry(as_name, info.dtype, shape, lambda: [tensor_bytes(self._base(info, tensor))])

    def _base(self, info: TensorInfo, tensor: MergedTensor) -> Tensor:
        merged, data = read_tensor(info), read_data(self.index.root, tensor)
        if tensor.coding != "update":
            return _stored(merged, tensor, data, info.name)
        try:
            change, data = self._change(info, tensor, data)
        except (RuntimeError, IndexError, KeyError):  # rows and layers that the tensors do not have
            raise _changed(info.name) from None
        undo = Undo(tensor.step, data, tensor.base or "", tensor.merged)
        return unmerge_weight(merged, change.delta, undo, info.name, change.scale)

    def _change(self, info: TensorInfo, tensor: MergedTensor, data: bytes) -> tuple[Change, bytes]:
        """What the merge added, and the bytes that are left for what it lost."""
        factors = []
        for size in factor_sizes(tensor.sources, self.states, info.shape):
            raw, data = data[: 8 * size], data[8 * size :]
            if len(raw) < 8 * size:
                raise _changed(info.name)
            factors.append(torch.frombuffer(bytearray(raw), dtype=torch.float64))
        return change_of(tensor.sources, self.states, self.record.weights, info.shape, factors=factors), data


def _stored(merged: Tensor, tensor: MergedTensor, data: bytes, name: str) -> Tensor:
    shape = tuple(merged.shape) if tensor.shape is None else tensor.shape
    if digest(merged) != tensor.merged:
        raise _changed(name)
    base = decompressed(data, shape, merged.dtype, merged if tensor.coding == "xor" else None)
    if base is None or digest(base) != tensor.base:
        raise _changed(name)
    return base


def _changed(name: str) -> UnmergeError:
    return UnmergeError(f"{name}: expected what the merge wrote, got a tensor, or a record, that was changed since.")
