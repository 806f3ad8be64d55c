"""Several fine-tunes of one base: a folder of differences for each, to be put on one live base in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from spectral_surgery.commands.compress import CompressReport, compress, plan_compression, with_choices
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.atomic import partial_folder
from spectral_surgery.files.compressed.checkpoint import open_compressed
from spectral_surgery.files.compressed.manifest import FILE_NAME
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.run import Run


def _nothing(name: str, report: CompressReport | None) -> None:
    del name, report


def compress_several(
    tuned: Mapping[str, Checkpoint],
    out: Path,
    options: CompressOptions,
    *,
    base: Checkpoint,
    origins: Mapping[str, str] | None = None,
    run: Run = Run(),  # noqa: B008 - frozen
    finished: Callable[[str, CompressReport | None], None] = _nothing,
) -> dict[str, CompressReport | None]:
    """Compress the differences of several checkpoints to one base, each into a folder of its name under ``out``.

    Each folder appears whole. Work that was cut off goes on with ``run.resume``: what is finished is left as it is.

    Returns:
        Reports by name; None of what an earlier run had finished.

    Args:
        origins: repositories on the Hub that checkpoints are copies of, by name, for the model cards.
        finished: called after each, with what becomes of its name.

    Raises:
        CheckpointError: before any work, when a folder is taken, or holds differences with other options; as
            `compress` otherwise.
    """
    there = {name for name, source in tuned.items() if _is_finished(source, out / name, options, base, run)}
    reports: dict[str, CompressReport | None] = {}
    for name, source in tuned.items():
        report = None
        if name not in there:
            this = replace(run, origin=(origins or {}).get(name))
            report = compress(source, out / name, options, base=base, run=this)
        reports[name] = report
        finished(name, report)
    return reports


def _is_finished(source: Checkpoint, folder: Path, options: CompressOptions, base: Checkpoint, run: Run) -> bool:
    """Whether an earlier run has made a folder. Raises CheckpointError when it is in the way."""
    if not run.resume or run.overwrite or not (folder / FILE_NAME).exists():
        partial_folder(folder, overwrite=run.overwrite)
        return False
    plan = plan_compression(source, with_choices(options), base=base)[1]
    made = open_compressed(folder, differences=True).manifest
    expected = json.loads(json.dumps(plan.options.to_json()))
    if made.options != expected or made.tensors.keys() != {tensor.info.name for tensor in plan.tensors}:
        raise CheckpointError(
            f"{folder}: expected what an earlier run with these options has finished, got differences to another base"
            " or with other options. Use --overwrite to replace it."
        )
    return True
