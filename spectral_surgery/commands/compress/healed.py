"""compress --heal: compress a checkpoint, then heal it, as one work that can be resumed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectral_surgery.calibration.layer_moments import CalibrationData
from spectral_surgery.commands.compress import CompressReport, compress, plan_compression
from spectral_surgery.commands.compress.calibrate import compress_calibrated
from spectral_surgery.commands.compress.keep_important import compress_important
from spectral_surgery.commands.heal import HealReport, heal
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.manifest import FILE_NAME
from spectral_surgery.files.compressed.plan import AUTO, DEFAULT_TRANSFORM, CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.publish import partial_folder
from spectral_surgery.files.remote_code import notes_on
from spectral_surgery.memory import peak_rss_bytes
from spectral_surgery.pool import Team
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.heal_text import HealData
from spectral_surgery.text.objectives import Keep, objective_of
from spectral_surgery.training.loop import DistillSettings


def compress_healed(
    source: Path,
    out: Path,
    options: CompressOptions,
    data: HealData,
    settings: DistillSettings,
    *,
    calibration: CalibrationData | None = None,
    keep: Keep | None = None,
    workers: int | Team = 1,
    threads: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    origin: str | None = None,
    progress: Progress = silent,
) -> tuple[CompressReport, HealReport]:
    """Compress a checkpoint and heal the result.

    What is compressed and not yet healed waits in ``<out>.unhealed``.

    Args:
        source: a checkpoint folder with a tokenizer.
        out: folder to create.
        options: what is asked.
        data: text to heal on.
        settings: how to heal.
        calibration: text to choose codes by.
        keep: of a density without calibration: the coefficients that count most, or the largest; None for the usual.
        workers: processes that compress, or a team of them.
        threads: frames at once.
        resume: go on with unfinished work of the same source, options and text.
        overwrite: replace an existing folder, and discard unfinished work.
        origin: the Hub repository that source is a copy of.
        progress: called as the work advances.

    Returns:
        The report of both together, and that of healing.

    Raises:
        CheckpointError: as `compress` and `heal`, and when unfinished work is of other options.
        ConfigError: as `compress_calibrated` and `heal`.
    """
    started = time.perf_counter()
    important = calibration is None and keeps_important(source, options, keep)
    if options.transform == AUTO and (calibration is not None or important):
        options = replace(options, transform=DEFAULT_TRANSFORM)
    stage = partial_folder(out, overwrite=overwrite).with_name(f"{out.resolve().name}.unhealed")
    common: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "origin": origin, "progress": progress}
    staged: CompressReport | None = None
    if resume and (stage / FILE_NAME).exists():
        _check_same(stage, options)
    elif important:
        compress_important(source, stage, options, data, workers=workers, threads=threads, **common)
    elif calibration is None:
        compress(source, stage, options, workers=workers, threads=threads, **common)
    else:
        staged = compress_calibrated(source, stage, options, calibration, workers=workers, threads=threads, **common)[0]
    healed = heal(stage, source, out, data, settings, threads=threads, **common)
    shutil.rmtree(stage)
    return _report(source, out, options, staged, replace(healed, seconds=time.perf_counter() - started)), healed


def keeps_important(source: Path, options: CompressOptions, keep: Keep | None) -> bool:
    """Whether the coefficients that count most are kept, and not the largest.

    Args:
        source: a checkpoint folder.
        options: what is asked.
        keep: as for `compress_healed`.

    Raises:
        ConfigError: when keep is given and no density is asked for.
    """
    if options.target.kind != "density":
        if keep is not None:
            raise ConfigError(f"--keep {keep}: goes with --sparsity; with --bits and --max-error nothing is dropped.")
        return False
    return (keep or objective_of(read_index(source).config).keep) == "important"


def _report(
    source: Path, out: Path, options: CompressOptions, staged: CompressReport | None, healed: HealReport
) -> CompressReport:
    index, plan = plan_compression(source, options)
    size = sum(file.stat().st_size for file in (*out.glob("*.safetensors"), out / FILE_NAME))
    left_out = tuple(str(path) for path in index.skipped_files)
    reached = staged.calibration if staged else None
    return CompressReport(
        healed.manifest,
        plan.copied,
        index.nbytes,
        size,
        healed.seconds,
        peak_rss_bytes(),
        left_out,
        (*index.notes, *notes_on(index.config)),
        reached,
    )


def _check_same(stage: Path, options: CompressOptions) -> None:
    there = open_compressed(stage).manifest.options
    asked = json.loads(json.dumps(options.to_json()))
    if any(there[key] != value for key, value in asked.items() if key not in ("calibration", "importance")):
        raise CheckpointError(f"{stage.name}: holds work of other options. Use --overwrite to discard it.")
