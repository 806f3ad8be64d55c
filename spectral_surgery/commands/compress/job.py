"""A compression under way: its plan, the folder of its finished units, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.checkpoints import compressed_card
from spectral_surgery.cards.command_line import compress_command
from spectral_surgery.engines import ENGINES
from spectral_surgery.engines.base import ALL, Work
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.atomic import discard_unfinished, partial_folder, replace_file, writing_to
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.joining import JoinedTensor, joined_before, write_down
from spectral_surgery.files.compressed.manifest import FILE_NAME, FORMAT_VERSION, QUANT_METHOD, Manifest
from spectral_surgery.files.compressed.plan import Plan
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.compressed.units import UNITS, UnitStore, join, paths_of, work_key
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.lock import VERSION_FILE, hold
from spectral_surgery.files.sidecar_files import copy_companions
from spectral_surgery.files.storage import Checkpoint, RemoteCheckpoint
from spectral_surgery.files.writer import weights_metadata, write_checkpoint
from spectral_surgery.run import Run


@dataclass(frozen=True)
class Job:
    """A compression under way.

    Attributes:
        plan: what is compressed; stages that ask for other rates of some tensors go on with another plan.
        store: the finished units.
        before: tensors that an earlier run has joined already, and whose units are gone.
        shard: which share of the units is ours, of how many.
    """

    source: Checkpoint
    index: CheckpointIndex
    plan: Plan
    store: UnitStore
    run: Run
    before: Mapping[str, JoinedTensor] = field(default_factory=dict)
    shard: tuple[int, int] = ALL

    @property
    def folder(self) -> Path:
        """``<out>.partial``."""
        return self.store.folder.parent

    def encode(self, *, last: bool = True) -> bool:
        """Encode the units that are not there yet, of our share; whether those of all shares are there then."""
        work = Work(self.store, self.plan, self.before.keys(), self.run, self.shard, last)
        return ENGINES[self.run.engine].encode(work)

    def write(self, folder: Path, *, give_way: bool = False) -> tuple[Manifest, dict[str, str], int]:
        """Join the units to a compressed checkpoint.

        Args:
            give_way: remove each unit when its tensor is in a weight file, to which a later run can go back.

        Returns:
            The manifest, the reason by name of each tensor that is copied, and the bytes of weights and manifest.
        """
        entries, manifest, copied = join(self.store, self.plan, self.index, self.before if give_way else None)
        if give_way:
            write_down(self.store.folder, self.store.key, manifest)
        manifest = replace(manifest, command=compress_command(self.plan.options))
        files = write_checkpoint(folder, entries, metadata=weights_metadata(self.index))
        self.write_beside(folder, manifest)
        cards.write_derived(folder, compressed_card(open_compressed(folder, differences=True), self.run.origin))
        return manifest, copied, sum(path.stat().st_size for path in [*files, folder / FILE_NAME])

    def write_beside(self, folder: Path, manifest: Manifest) -> dict[str, object]:
        """Write what is beside the weights, but for the card. Returns the configuration."""
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        marked = dict(self.index.config) | {"quantization_config": _quantization_config(self.plan.options)}
        copy_companions(self.index, folder, marked)
        return marked


@contextmanager
def opened(
    source: Checkpoint, out: Path, index: CheckpointIndex, plan: Plan, run: Run, *, shard: tuple[int, int] | None = None
) -> Iterator[Job]:
    """Begin a compression, or go on with one. ``shard``: of several processes that share the folder; None alone."""
    alone, aside = shard is None, partial_folder(out, overwrite=run.overwrite)
    with ENGINES[run.engine].reached(run):
        if alone and not run.resume:
            discard_unfinished(aside, overwrite=run.overwrite)
        job = Job(source, index, plan, UnitStore(aside / UNITS, work_key(index, plan.options)), run, shard=shard or ALL)
        with writing_to(out):
            job.store.folder.mkdir(parents=True, exist_ok=True)
        with hold(aside, exclusive=alone, wait=not alone):
            if isinstance(source, RemoteCheckpoint):
                _keep_to_version(source, aside / VERSION_FILE, anew=alone and not run.resume)
            before = joined_before(job.store.folder, job.store.key, aside, paths_of(job.store, plan))
            yield replace(job, before=before)


def _keep_to_version(source: RemoteCheckpoint, record: Path, *, anew: bool) -> None:
    """Remember the version of a source elsewhere, or refuse to go on with another one than before."""
    before = source.version if anew or not record.exists() else record.read_text(encoding="utf-8")
    if before != source.version:
        raise CheckpointError(
            f"{source}: has moved on since this work began, from {before[:12]} to {source.version[:12]}; expected the"
            f" same. Go on with --revision {before}, or discard the work with --overwrite."
        )
    replace_file(record, source.version.encode())


def _quantization_config(options: CompressOptions) -> dict[str, object]:
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        options.target.kind: options.target.value or True,
        "transform": options.transform,
        "tile": options.tile,
    }
