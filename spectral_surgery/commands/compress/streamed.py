"""Compress and push at once: each weight file is uploaded and removed when it is finished, for one commit of all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from spectral_surgery import hub
from spectral_surgery.ahead import ahead
from spectral_surgery.cards import card as cards
from spectral_surgery.cards.check import Checked
from spectral_surgery.cards.checkpoints import compressed_card
from spectral_surgery.cards.command_line import compress_command
from spectral_surgery.commands.compress.job import Job
from spectral_surgery.commands.push import PushReport, push_stored
from spectral_surgery.files.atomic import clear_folder, publishing, replace_file, writing_to
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.manifest import Manifest, TensorRecord, parse_manifest
from spectral_surgery.files.compressed.plan import Plan
from spectral_surgery.files.compressed.units import UnitStore, join, source_digest
from spectral_surgery.files.header import TensorInfo, read_header
from spectral_surgery.files.lock import NO_WORK
from spectral_surgery.files.writer import shard_names, weights_metadata, weights_name, write_file, write_index

T = TypeVar("T")

_RESULT = "result"  # folder of what is beside the weights


@dataclass(frozen=True)
class Piece:
    """What goes into one weight file: tensors to compress, or to copy.

    ``before``: weights that earlier pieces compress.
    """

    number: int
    plan: Plan
    file: str
    before: int


@dataclass(frozen=True)
class WrittenPiece:
    """What is in a weight file.

    Attributes:
        copied: reason by name of what it has copied.
        stored: what the Hub has of it; None while the file is here.
    """

    manifest: Manifest
    copied: dict[str, str]
    tensors: dict[str, TensorInfo]
    stored: hub.Stored | None = None

    def to_json(self) -> dict[str, object]:
        """For the record of a run that goes on."""
        rows = [[info.name, info.dtype, info.shape, info.start, info.nbytes] for info in self.tensors.values()]
        stored = vars(self.stored) if self.stored else None
        body = json.loads(self.manifest.to_json())
        return {"manifest": body, "copied": self.copied, "tensors": rows, "stored": stored}


def pieces_of(job: Job, size: int) -> list[Piece]:
    """Cut the work into weight files of about so many bytes, in the order of tensors; what is copied comes last."""
    bits, plan = job.plan.predicted_bits(), job.plan
    compressed = [(tensor, round(tensor.info.numel * bits / 8)) for tensor in plan.tensors]
    copied = [(name, job.index.tensors[name].nbytes) for name in plan.copied]
    plans = [replace(plan, tensors=tuple(group), copied={}, aliases={}) for group in _groups(compressed, size)]
    plans += [
        replace(plan, tensors=(), copied={name: plan.copied[name] for name in group}, aliases={})
        for group in _groups(copied, size)
    ]
    names = shard_names(weights_name(job.index), len(plans))
    before = [0, *accumulate(plan.weights for plan in plans)]
    return [Piece(*all_of) for all_of in zip(range(len(plans)), plans, names, before, strict=False)]


def _groups(sized: list[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    group: list[T] = []
    room = limit
    for item, size in sized:
        if group and size > room:
            yield group
            group, room = [], limit
        group.append(item)
        room -= size
    if group:
        yield group


@dataclass(frozen=True)
class StreamedPush:
    """A compression whose weight files go to a repository one by one. ``size``: bytes of a weight file, about."""

    job: Job
    size: int
    repository: hub.Repository
    token: str | None

    @property
    def key(self) -> str:
        """Of what decides a weight file and where it goes; work of another key is done again."""
        return hashlib.sha256(f"{self.job.store.key} {self.size} {self.repository}".encode()).hexdigest()

    def run(self, out: Path) -> tuple[Manifest, dict[str, str], int, PushReport]:
        """Compress, upload and commit; ``out`` gets what is beside the weights.

        Returns the manifest, the reason by name of each tensor that is copied, the bytes of all files, and the push.
        """
        made, whole = ((piece, self._made(piece)) for piece in pieces_of(self.job, self.size)), []
        # one is uploaded while the next one is encoded
        for (piece, one), stored in ahead(lambda pair: pair[1].stored or self._store(pair[0]), made, 1):
            whole.append(replace(one, stored=stored))
            self._remember(piece, whole[-1])
            self._path(piece).unlink(missing_ok=True)
        manifest, report = self._publish(whole)
        with publishing(out, overwrite=self.job.run.overwrite, keep_partial=True) as folder:
            clear_folder(folder, keep=(_RESULT,))
            for path in (folder / _RESULT).iterdir():
                path.rename(folder / path.name)
            (folder / _RESULT).rmdir()
            for name in NO_WORK:
                (folder / name).unlink(missing_ok=True)
        copied = {name: reason for one in whole for name, reason in one.copied.items()}
        return manifest, copied, sum(report.files.values()), report

    def _made(self, piece: Piece) -> WrittenPiece:
        """Encode a piece and write its weight file, unless an earlier run has."""
        there = self._recalled(piece)
        if there is not None:
            return there
        store = UnitStore(self.job.store.folder / f"{piece.number:05d}", self.key)
        with writing_to(store.folder):
            store.folder.mkdir(parents=True, exist_ok=True)
        tell, everything = self.job.run.progress, self.job.plan.weights
        run = replace(self.job.run, progress=lambda done, _, what: tell(piece.before + done, everything, what))
        replace(self.job, plan=piece.plan, store=store, run=run).encode(last=False)
        entries, manifest, copied = join(store, piece.plan, self.job.index)
        write_file(self._path(piece), entries, metadata=weights_metadata(self.job.index))
        done = WrittenPiece(manifest, copied, read_header(self._path(piece)).tensors)
        self._remember(piece, done)
        shutil.rmtree(store.folder)
        return done

    def _path(self, piece: Piece) -> Path:
        return self.job.folder / piece.file

    def _store(self, piece: Piece) -> hub.Stored:
        return hub.store(self.repository, self._path(piece), token=self.token)

    def _record(self, piece: Piece) -> Path:
        return self.job.store.folder / f"{piece.number:05d}.written"

    def _remember(self, piece: Piece, one: WrittenPiece) -> None:
        replace_file(self._record(piece), json.dumps({"key": self.key, **one.to_json()}).encode())

    def _recalled(self, piece: Piece) -> WrittenPiece | None:
        """What an earlier run has written, if it is on the Hub, or here and whole."""
        record, file = self._record(piece), self._path(piece)
        body = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        if body.get("key") != self.key:
            return None
        stored = hub.Stored(**body["stored"]) if body["stored"] else None
        if stored is None and not file.exists():
            return None
        tensors = {
            name: TensorInfo(name, dtype, tuple(shape), file, start, nbytes)
            for name, dtype, shape, start, nbytes in body["tensors"]
        }
        return WrittenPiece(parse_manifest(body["manifest"]), body["copied"], tensors, stored)

    def _publish(self, whole: list[WrittenPiece]) -> tuple[Manifest, PushReport]:
        """Write what is beside the weights, and commit all."""
        job, records = self.job, dict[str, TensorRecord]()
        for one in whole:
            records |= one.manifest.tensors
        options = job.plan.options
        manifest = Manifest(records, dict(job.plan.aliases), options.to_json(), source_digest(job.index))
        manifest = replace(manifest, command=compress_command(options))
        folder = job.folder / _RESULT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        marked = job.write_beside(folder, manifest)
        tensors = {name: info for one in whole for name, info in one.tensors.items()}
        if len(whole) > 1:
            weight_map = {name: info.file.name for name, info in tensors.items()}
            total = sum(info.nbytes for info in tensors.values())
            write_index(folder, weights_name(job.index), weight_map, total)
        index = replace(job.index, root=folder, tensors=tensors, files=(), config=marked, metadata={})
        content = compressed_card(CompressedCheckpoint(index, manifest), job.run.origin)
        cards.write_derived(folder, content)
        checked = Checked("compressed", index, content, complete=True)
        stored = [one.stored for one in whole if one.stored]
        return manifest, push_stored(folder, stored, checked, self.repository, self.token)
