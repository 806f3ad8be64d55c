"""compress: a checkpoint to entropy-coded spectra, from files, one part at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.checkpoints import compressed_facts
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress.coverage import Coverage
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.difference import describe
from spectral_surgery.files.compressed.manifest import FILE_NAME, FORMAT_VERSION, QUANT_METHOD, Manifest
from spectral_surgery.files.compressed.plan import CompressOptions, Plan, Unit, make_plan
from spectral_surgery.files.compressed.units import UNITS, Workshop, is_done, join, run_unit, work_key
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.lock import LOCK_FILE, hold
from spectral_surgery.files.remote_code import notes_on
from spectral_surgery.files.sidecar_files import check_apart, copy_companions
from spectral_surgery.files.writer import partial_folder, publishing, weights_metadata, write_checkpoint, writing_to
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.pool import Team, team
from spectral_surgery.progress import Progress, silent


@dataclass(frozen=True)
class CompressReport:
    """What a compression did; ``to_json`` has the documented keys.

    Attributes:
        manifest: what was written.
        copied: reason by name of tensors stored bit for bit.
        input_bytes: weight files read.
        output_bytes: weight files and manifest written.
        seconds: wall time.
        peak_rss_bytes: largest resident size of this process and its workers.
        not_copied_files: files of other weight formats left out.
        notes: what was odd about the source, in sentences.
        calibration: what text reached; None without text, or when an earlier run had it.
    """

    manifest: Manifest
    copied: dict[str, str]
    input_bytes: int
    output_bytes: int
    seconds: float
    peak_rss_bytes: int
    not_copied_files: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    calibration: Coverage | None = None

    @property
    def compression_ratio(self) -> float:
        """Input bytes over output bytes, the whole checkpoint and manifest counted."""
        return self.input_bytes / self.output_bytes

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        total = self.manifest.report
        return {
            "bits_per_weight": total.bits_per_weight,
            "compression_ratio": self.compression_ratio,
            "relative_error": total.relative_error,
            "density": total.density,
            "tensors": [
                {
                    "name": name,
                    "shape": list(record.shape),
                    "bits_per_weight": record.report.bits_per_weight,
                    "relative_error": record.report.relative_error,
                    "density": record.report.density,
                    "transform": "+".join(sorted({part.transform for part in record.parts})),
                }
                for name, record in self.manifest.tensors.items()
            ],
            "skipped": [{"name": name, "reason": reason} for name, reason in sorted(self.copied.items())],
            "tied": self.manifest.aliases,
            "files_left_out": list(self.not_copied_files),
            "notes": list(self.notes),
            "calibration": self.calibration.to_json() if self.calibration else None,
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def plan_compression(
    source: Path,
    options: CompressOptions,
    *,
    compare: bool = True,
    base: Path | None = None,
) -> tuple[CheckpointIndex, Plan]:
    """Read the headers of a checkpoint and decide what compressing it does; nothing is written.

    Args:
        source: a checkpoint folder or a .safetensors file.
        options: what is asked.
        compare: read tensors that may be tied, and the base; without, as for an outline of a remote checkpoint, none is
            taken to be tied.
        base: compress differences to this checkpoint; options may name it.

    Returns:
        The index and the plan.

    Raises:
        CheckpointError: when the source or the base is no dense safetensors checkpoint.
    """
    index = _dense(source)
    if base is None:
        return index, make_plan(index, replace(options, base=None), compare=compare)
    before = _dense(base)
    if compare:
        options = replace(options, base=describe(before, options.base or base.resolve().name))
    return index, make_plan(index, options, compare=compare, base=before)


def why_refused(index: CheckpointIndex) -> str | None:
    """Why compress does not take a checkpoint whose headers can be read, and what to do; None when it does.

    Args:
        index: headers of it.
    """
    quantised = index.config.get("quantization_config")
    if not isinstance(quantised, dict):
        return None
    method = quantised.get("quant_method")
    remedy = "Decompress it first." if method == QUANT_METHOD else "Start from the unquantised checkpoint."
    return f"is quantised already ({method}); a dense checkpoint is accepted. {remedy}"


def _dense(source: Path) -> CheckpointIndex:
    index = read_index(source)
    reason = why_refused(index)
    if reason:
        raise CheckpointError(f"{index.root.name}: {reason}")
    return index


def compress(
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    workers: int | Team = 1,
    threads: int = 1,
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    overwrite: bool = False,
    origin: str | None = None,
    base: Path | None = None,
    targets: Mapping[str, Target] | None = None,
    progress: Progress = silent,
) -> CompressReport | None:
    """Compress a checkpoint into a new folder, which appears at the end, whole.

    The bytes do not depend on workers, threads, shards or interruptions.

    Args:
        source: a checkpoint folder or a .safetensors file.
        out: folder to create.
        options: what is asked.
        workers: processes, which import the calling script: it needs a ``__main__`` guard; or a team of them, of which
            this is the last work.
        threads: frames at once in each worker.
        shard: (index, count) of this machine among those that share a file system; the last to finish joins parts.
        resume: go on with unfinished work of the same source and options.
        overwrite: replace an existing folder, and discard unfinished work.
        origin: the Hub repository that source is a copy of, for the model card.
        base: compress differences to this checkpoint, which decompressing needs again; errors and rates are theirs.
        targets: of tensors that are asked for something else, by name.
        progress: called as parts are done.

    Returns:
        The report; None when parts of other shards are still missing.

    Raises:
        CheckpointError: when the source is unusable, out is taken, or unfinished work is in the way.
    """
    started = time.perf_counter()
    _check(options, shard)
    check_apart(source, out)
    check_apart(base or source, out)
    index, plan = plan_compression(source, options, base=base)
    plan, alone = plan.with_targets(targets or {}), shard[1] == 1
    aside = partial_folder(out, overwrite=overwrite)
    if alone and not resume:
        discard(aside, overwrite=overwrite)
    workshop = Workshop(aside / UNITS, work_key(index, plan.options))
    with writing_to(out):
        workshop.folder.mkdir(parents=True, exist_ok=True)
        with hold(aside, exclusive=alone, wait=not alone), _team(workers) as own:
            _run(workshop, plan, plan.shard(*shard), own, threads=threads, progress=progress)
            if not alone and not all(is_done(workshop, unit) for unit in plan.units):
                return None
        with hold(aside, exclusive=True, wait=True):
            if not workshop.folder.exists():  # another shard joined everything
                return None
            return _finish(workshop, plan, index, out, overwrite=overwrite, origin=origin, started=started)


@contextmanager
def choosing_codes(
    out: Path, index: CheckpointIndex, options: CompressOptions, *, resume: bool, overwrite: bool
) -> Iterator[Workshop]:
    """Where codes that are chosen elsewhere are left; `compress` with resume then does the rest.

    Args:
        out: folder to create.
        index: of the source.
        options: what is asked.
        resume: go on with unfinished work of the same source and options.
        overwrite: replace an existing folder, and discard unfinished work.

    Raises:
        CheckpointError: when out is taken, or unfinished work is in the way.
    """
    partial = partial_folder(out, overwrite=overwrite)
    if not resume:
        discard(partial, overwrite=overwrite)
    workshop = Workshop(partial / UNITS, work_key(index, options))
    with writing_to(out):
        workshop.folder.mkdir(parents=True, exist_ok=True)
        with hold(partial, exclusive=True, wait=False):
            yield workshop


def _check(options: CompressOptions, shard: tuple[int, int]) -> None:
    if not 0 <= shard[0] < shard[1]:
        raise ConfigError(f"shard {shard[0]}/{shard[1]}: out of range; 0/n to n-1/n is accepted.")
    if options.allocation != "even" and options.calibration is None and options.importance is None:
        raise ConfigError(f"allocation {options.allocation}: needs text to measure on; without any, even is accepted.")


def _team(workers: int | Team) -> AbstractContextManager[Team]:
    return team(workers) if isinstance(workers, int) else nullcontext(workers)


def discard(aside: Path, *, overwrite: bool) -> None:
    """Clear unfinished work away, if there is any; a run that failed before its first result has left none.

    Args:
        aside: where it is.
        overwrite: whether that is allowed.

    Raises:
        CheckpointError: when it is not.
    """
    if not any(path.is_file() and path.name != LOCK_FILE for path in aside.rglob("*")):
        return
    if not overwrite:
        raise CheckpointError(
            f"{aside.name}: holds unfinished work; use --resume to go on with it, or --overwrite to discard it."
        )
    shutil.rmtree(aside)


def _run(workshop: Workshop, plan: Plan, units: list[Unit], own: Team, *, threads: int, progress: Progress) -> None:
    weights = list(accumulate(unit.weights for unit in units))  # largest first
    last = -1
    for last in own.share(partial(run_unit, workshop, options=plan.options, threads=threads), units, last=True):
        progress(weights[last], weights[-1], units[last].tensor.info.name)  # others may still be at earlier ones
    if last + 1 < len(units):
        progress(weights[-1], weights[-1], units[-1].tensor.info.name)


def _finish(
    workshop: Workshop,
    plan: Plan,
    index: CheckpointIndex,
    out: Path,
    *,
    overwrite: bool,
    origin: str | None,
    started: float,
) -> CompressReport:
    entries, manifest, copied = join(workshop, plan, index)
    with publishing(out, overwrite=overwrite, keep_partial=True) as folder:
        _clear_leftovers(folder)
        files = write_checkpoint(folder, entries, metadata=weights_metadata(index))
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        marked = dict(index.config) | {"quantization_config": _quantization_config(plan.options)}
        copy_companions(index, folder, marked)
        facts = compressed_facts(open_compressed(folder, differences=True), origin)
        cards.write_derived(folder, facts)
        (folder / LOCK_FILE).unlink(missing_ok=True)
        shutil.rmtree(workshop.folder)
        output = sum(path.stat().st_size for path in [*files, folder / FILE_NAME])
    return CompressReport(
        manifest,
        copied,
        index.nbytes,
        output,
        time.perf_counter() - started,
        peak_rss_bytes(),
        tuple(str(path) for path in index.skipped_files),
        (*index.notes, *notes_on(index.config)),
    )


def _clear_leftovers(folder: Path) -> None:
    for path in folder.iterdir():  # of an attempt that was killed while joining
        if path.name not in (UNITS, LOCK_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _quantization_config(options: CompressOptions) -> dict[str, object]:
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        options.target.kind: options.target.value,
        "transform": options.transform,
        "tile": options.tile,
    }
