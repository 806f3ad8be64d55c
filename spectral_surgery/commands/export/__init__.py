"""export: an adapter in another form, or a model in the format of another program."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.card import as_repository
from spectral_surgery.cards.checkpoints import exported_card
from spectral_surgery.cards.command_line import command_line, setting_options
from spectral_surgery.commands.export.adapter import (
    ADAPTER_TARGETS,
    DELTA,
    AdapterTarget,
    ExportPlan,
    ExportReport,
    export,
    needs_base,
    plan_export,
)
from spectral_surgery.commands.export.compressed_tensors import COMPRESSED_TENSORS
from spectral_surgery.commands.export.exact_levels import COMPRESSED_TENSORS_EXACT
from spectral_surgery.commands.export.gguf import GGUF
from spectral_surgery.commands.export.model import Measure, ModelExport, ModelPlan, ModelTarget
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.atomic import publishing
from spectral_surgery.files.compressed.dense import open_dense
from spectral_surgery.files.sidecar_files import check_apart
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.progress import Progress, silent
from spectral_surgery.registry import Table

__all__ = [
    "DELTA",
    "TARGETS",
    "AdapterTarget",
    "ExportPlan",
    "ExportReport",
    "ModelExport",
    "ModelPlan",
    "ModelTarget",
    "export",
    "export_model",
    "model_target",
    "needs_base",
    "plan_export",
    "plan_model",
]

TARGETS: Table[AdapterTarget | ModelTarget] = Table(
    "export target", (*ADAPTER_TARGETS, COMPRESSED_TENSORS, COMPRESSED_TENSORS_EXACT, GGUF)
)


def model_target(to: str) -> ModelTarget:
    """A row of TARGETS that models are exported to.

    Raises:
        ConfigError: when there is no such row, or it is for adapters.
    """
    row = TARGETS[to]
    if isinstance(row, AdapterTarget):
        names = ", ".join(row.name for row in TARGETS.values() if isinstance(row, ModelTarget))
        raise ConfigError(f"--to {to}: is a form of adapters; expected one of models: {names}.")
    return row


def plan_model(source: Checkpoint, to: str, settings: Any = None, *, threads: int = 1) -> ModelPlan:
    """Read the headers of a model, and see whether a format can hold it; nothing is written.

    Args:
        source: a folder, compressed or plain.
        to: row of TARGETS.
        settings: of that row; None for its defaults.
        threads: frames decoded at once.

    Raises:
        CheckpointError: as `export_model`.
        ConfigError: as `export_model`.
        BackendError: as `export_model`.
    """
    target = model_target(to)
    return target.plan(open_dense(source, threads=threads), settings if settings is not None else target.config())


def export_model(
    source: Checkpoint,
    out: Path,
    to: str,
    settings: Any = None,
    *,
    original: Checkpoint | None = None,
    threads: int = 1,
    overwrite: bool = False,
    origin: str | None = None,
    progress: Progress = silent,
) -> ModelExport:
    """Write a model in the format of another program, tensor by tensor.

    Args:
        source: a folder, compressed or plain.
        out: folder to create.
        to: row of TARGETS.
        settings: of that row; None for its defaults.
        original: the checkpoint that source was compressed from, to measure errors against; None not to.
        threads: frames decoded at once.
        overwrite: replace an existing folder.
        origin: the Hub repository that source is a copy of, for the model card.
        progress: called after each tensor.

    Returns:
        The report.

    Raises:
        CheckpointError: when something is damaged, or out is taken.
        ConfigError: when the format cannot hold a tensor, which is named, or a token.
        BackendError: when a library is missing.
    """
    started = time.perf_counter()
    check_apart(source, out)
    checkpoint = open_dense(source, threads=threads)
    target = model_target(to)
    settings = settings if settings is not None else target.config()
    plan = target.plan(checkpoint, settings)
    measure = Measure(checkpoint, open_dense(original) if original else None)
    with publishing(out, overwrite=overwrite) as folder:
        files = plan.write(folder, measure, progress)
        command = command_line(
            "export", (as_repository(origin) or "SOURCE", "OUT"), {"to": to, "o": setting_options(settings)}
        )
        stored = sum(file.stat().st_size for file in files)
        report = ModelExport(
            to,
            tuple(measure.tensors),
            plan.kept,
            tuple(sorted(file.name for file in files)),
            stored,
            measure.export_error,
            measure.total_error,
            plan.notes,
            time.perf_counter() - started,
        )
        cards.write_derived(folder, exported_card(checkpoint.index, report.to_json(), command, origin))
    return report
