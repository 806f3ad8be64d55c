"""compress: a checkpoint to entropy-coded spectra, from files, one part at a time."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from spectral_surgery import hub
from spectral_surgery.commands.compress.calibrate import calibrated
from spectral_surgery.commands.compress.coverage import Coverage
from spectral_surgery.commands.compress.job import Job, opened
from spectral_surgery.commands.compress.keep_important import keep_important
from spectral_surgery.commands.compress.streamed import StreamedPush
from spectral_surgery.commands.heal import STATE, HealReport, heal_checkpoint, write_healed
from spectral_surgery.commands.push import PushReport
from spectral_surgery.commands.settings import Healing
from spectral_surgery.engines import ENGINES
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.atomic import clear_folder, publishing
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.difference import describe
from spectral_surgery.files.compressed.manifest import FILE_NAME, Manifest
from spectral_surgery.files.compressed.plan import Plan, make_plan
from spectral_surgery.files.compressed.settings import AUTO, DEFAULT_TRANSFORM, CompressOptions
from spectral_surgery.files.compressed.units import UNITS
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.lock import NO_WORK, hold
from spectral_surgery.files.remote_code import notes_on
from spectral_surgery.files.sidecar_files import check_apart
from spectral_surgery.files.storage import Checkpoint, here, path_of
from spectral_surgery.inputs.kinds import digest_of
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.run import Run
from spectral_surgery.text.objectives import objective_of
from spectral_surgery.text.settings import Keep, TextData
from spectral_surgery.training.loop import Clock

_UNHEALED = "unhealed"  # folder of what is compressed and not yet healed
_KEPT_SAMPLES = 128  # sequences that choose what is kept: what more of them bring, healing does in the same time


@dataclass(frozen=True)
class CompressReport:
    """What a compression did; ``to_json`` has the documented keys.

    Attributes:
        copied: reason by name of tensors stored bit for bit.
        output_bytes: weight files and manifest written.
        peak_rss_bytes: largest resident size of this process and its workers.
        not_copied_files: files of other weight formats left out.
        notes: what was odd about the source, in sentences.
        calibration: what text reached; None without text, or when an earlier run had it.
        healing: what healing did; None without it.
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
    healing: HealReport | None = None

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
            "healing": self.healing.to_json() if self.healing else None,
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def plan_compression(
    source: Checkpoint, options: CompressOptions, *, compare: bool = True, base: Checkpoint | None = None
) -> tuple[CheckpointIndex, Plan]:
    """Read the headers of a checkpoint and decide what compressing it does; nothing is written."""
    index = _dense(source)
    if base is None:
        return index, make_plan(index, replace(options, base=None), compare=compare)
    before = _dense(base)
    if compare:
        options = replace(options, base=describe(before, options.base or path_of(base).resolve().name))
    return index, make_plan(index, options, compare=compare, base=before)


def _dense(source: Checkpoint) -> CheckpointIndex:
    index = read_index(source)
    index.require_plain()
    return index


def compress(
    source: Checkpoint,
    out: Path,
    options: CompressOptions,
    *,
    calibrate: TextData | None = None,
    heal: Healing | None = None,
    base: Checkpoint | None = None,
    device: str = "cpu",
    run: Run = Run(),  # noqa: B008 - frozen
    clock: Clock = time.perf_counter,
) -> CompressReport:
    """Compress a checkpoint into a new folder, which appears at the end, whole.

    The bytes do not depend on workers, threads or interruptions; with text they depend on the device a little.

    Args:
        calibrate: text to choose codes by.
        base: checkpoint that the difference to is compressed.
        device: the model runs on it where there is text.

    Raises:
        CheckpointError: when the source is unusable, out is taken, or unfinished work is in the way.
        ConfigError: when options do not go together, or text is too short or foreign to the model.
        TargetError: when the model cannot be run on text alone.
    """
    started = time.perf_counter()
    _check_together(options, base, text=calibrate is not None or heal is not None)
    _check_engine(options, run, device, calibrate=calibrate is not None, heal=heal is not None)
    if calibrate or heal:
        here(source)
    if calibrate and heal and heal.keep is not None:
        raise ConfigError(f"--keep {heal.keep}: expected without --calibrate, which chooses itself, got both.")
    keep = kept_by(source, options, heal.keep) if heal and calibrate is None else None
    if heal and keep == "calibrated":
        calibrate = replace(heal.data, samples=heal.data.samples or _KEPT_SAMPLES)
    important = keep == "important"
    calibration = digest_of(calibrate, read_index(source).config) if calibrate else None
    options = with_choices(options, calibration, heal.data.digest() if heal and important else None)
    check_apart(source, out)
    check_apart(base or source, out)
    index, plan = plan_compression(source, options, base=base)
    with opened(source, out, index, plan, run) as begun:
        job, unhealed, reached = begun, begun.folder / _UNHEALED, None
        if not (heal and _is_there(unhealed, plan)):
            if calibrate:
                job, reached = calibrated(job, calibrate, device)
            elif heal and important:
                keep_important(job, heal.data)
            job.encode()
        if heal is None:
            report = _finish(job, out, started)
        else:
            report = _healed(job, unhealed, out, heal, started, device=device, clock=clock)
    return replace(report, calibration=reached)


def _check_together(options: CompressOptions, base: Checkpoint | None, *, text: bool) -> None:
    if options.target.kind == "lossless" and (base is not None or text):
        raise ConfigError("--lossless: expected without --base, --calibrate and --heal, got one of them. Leave it out.")
    if base is not None and text:
        raise ConfigError("--base: expected without --calibrate and --heal, got text. Leave it out.")


def _check_engine(options: CompressOptions, run: Run, device: str, *, calibrate: bool, heal: bool) -> None:
    """What runs the model elsewhere than here: calibration at a rate, on the processors of a cluster."""
    where, engine = f"--engine {run.engine}", ENGINES[run.engine]
    if heal and run.engine != "local":
        raise ConfigError(f"{where}: expected without --heal, which trains here, got it. Run heal on the result.")
    if not calibrate or run.engine == "local":
        return
    if engine.shares is None:
        raise ConfigError(f"{where}: expected without --calibrate, got it. Use --engine ray, or leave it out.")
    if options.target.kind == "density":
        raise ConfigError(
            f"{where}: expected --bits with --calibrate, got --sparsity, which runs the original beside. Leave the"
            " engine out."
        )
    if device != "cpu":
        raise ConfigError(f"{where}: expected --device cpu with --calibrate, got {device}. Leave one of them out.")


def compress_shard(
    source: Checkpoint,
    out: Path,
    options: CompressOptions,
    shard: tuple[int, int],
    *,
    base: Checkpoint | None = None,
    run: Run = Run(),  # noqa: B008 - frozen
) -> CompressReport | None:
    """Do one share of a compression without text, together with other processes or machines that share a file system.

    Returns:
        The report; None when parts of other shards are still missing.

    Raises:
        ConfigError: when there is no such shard.
    """
    started = time.perf_counter()
    if not 0 <= shard[0] < shard[1]:
        raise ConfigError(f"shard: expected 0/n to n-1/n, got {shard[0]}/{shard[1]}.")
    _check_together(options, base, text=False)
    check_apart(source, out)
    check_apart(base or source, out)
    index, plan = plan_compression(source, with_choices(options), base=base)
    with opened(source, out, index, plan, replace(run, engine="torchrun"), shard=shard) as job:
        if not job.encode():
            return None
    with hold(job.folder, exclusive=True, wait=True):
        if not job.store.folder.exists():  # another shard joined everything
            return None
        return _finish(job, out, started)


def compress_and_push(
    source: Checkpoint,
    out: Path,
    options: CompressOptions,
    repository: str,
    size: int,
    *,
    base: Checkpoint | None = None,
    token: str | None = None,
    run: Run = Run(),  # noqa: B008 - frozen
) -> tuple[CompressReport, PushReport]:
    """Compress without text, and upload each weight file when it is finished; one commit at the end has them all.

    Two weight files and their parts are on the disk at once, and what failed is gone on with. Nothing is published
    before the end.

    Args:
        out: folder to create, for all that is beside the weights.
        repository: ``org/name``, which exists.
        size: bytes of a weight file, about.

    Raises:
        CheckpointError: as `compress`.
        ConfigError: as `compress`.
        HubError: when something cannot be uploaded.
    """
    started, target = time.perf_counter(), hub.to_push(repository)
    check_apart(source, out)
    check_apart(base or source, out)
    index, plan = plan_compression(source, with_choices(options), base=base)
    with opened(source, out, index, plan, run) as job:
        manifest, copied, nbytes, pushed = StreamedPush(job, size, target, token).run(out)
    return _report(job, manifest, copied, nbytes, started), pushed


def kept_by(source: Checkpoint, options: CompressOptions, keep: Keep | None) -> Keep | None:
    """How the coefficients that are healed are chosen; None where all are.

    Raises ConfigError when keep is given and no density is asked for.
    """
    if options.target.kind != "density":
        if keep is not None:
            raise ConfigError(
                f"--keep {keep}: expected with --sparsity, got a target that drops nothing. Leave it out."
            )
        return None
    return keep or objective_of(read_index(source).config).keep


def with_choices(
    options: CompressOptions, calibration: str | None = None, importance: str | None = None
) -> CompressOptions:
    """The options with every choice made that was left open."""
    if calibration is None and importance is None:
        if options.allocation == "slope":
            raise ConfigError("allocation: expected even without text, got slope, which text is needed to measure.")
        return replace(options, allocation="even")
    # measured: a calibrated kept set is worse for being spread
    even = calibration is not None and options.target.kind == "density"
    return replace(
        options,
        transform=DEFAULT_TRANSFORM if options.transform == AUTO else options.transform,
        allocation=options.allocation or ("even" if even else "slope"),
        calibration=calibration,
        importance=importance,
    )


def _finish(job: Job, out: Path, started: float) -> CompressReport:
    with publishing(out, overwrite=job.run.overwrite, keep_partial=True) as folder:
        clear_folder(folder, keep=(UNITS, *(info.file.name for one in job.before.values() for info in one.infos)))
        # codes that text has chosen are looked for among the units by a run that goes on
        chosen = job.plan.options.calibration or job.plan.options.importance
        manifest, copied, size = job.write(folder, give_way=not chosen)
        for name in NO_WORK:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(job.store.folder)
    return _report(job, manifest, copied, size, started)


def _healed(
    job: Job, unhealed: Path, out: Path, heal: Healing, started: float, *, device: str, clock: Clock
) -> CompressReport:
    if not unhealed.exists():
        with publishing(unhealed, overwrite=True) as folder:
            job.write(folder)
    shutil.rmtree(job.store.folder, ignore_errors=True)
    checkpoint = open_compressed(unhealed)
    state = job.folder / STATE
    entries, healed = heal_checkpoint(
        checkpoint,
        job.index,
        here(job.source),
        data=heal.data,
        settings=heal.settings,
        state=state,
        run=job.run,
        device=device,
        clock=clock,
    )
    with publishing(out, overwrite=job.run.overwrite, keep_partial=True) as folder:
        clear_folder(folder, keep=(_UNHEALED, STATE))
        size = write_healed(folder, checkpoint, entries, healed, job.run.origin)
        shutil.rmtree(unhealed)
    report = _report(job, healed.manifest, dict(job.plan.copied), size, started)
    return replace(report, healing=healed)


def _report(job: Job, manifest: Manifest, copied: dict[str, str], size: int, started: float) -> CompressReport:
    index, seconds = job.index, time.perf_counter() - started
    left_out = tuple(str(path) for path in index.skipped_files)
    notes = (*index.notes, *notes_on(index.config))
    return CompressReport(manifest, copied, index.nbytes, size, seconds, peak_rss_bytes(), left_out, notes)


def _is_there(unhealed: Path, plan: Plan) -> bool:
    """Whether an earlier run has compressed, and not yet healed."""
    if not (unhealed / FILE_NAME).exists():
        return False
    there, asked = open_compressed(unhealed).manifest.options, json.loads(json.dumps(plan.options.to_json()))
    if there != asked:
        raise CheckpointError(
            f"{unhealed.parent.name}: expected work of these options, got that of others. Discard it with --overwrite."
        )
    return True
