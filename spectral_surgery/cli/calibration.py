"""Options of compress that bring text in: --calibrate and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from spectral_surgery.checkpoint.plan import CompressOptions
    from spectral_surgery.workflows.calibrate import CalibrationData
    from spectral_surgery.workflows.compress import CompressReport
    from spectral_surgery.workflows.progress import Progress
    from spectral_surgery.workflows.team import Team

F = TypeVar("F", bound=Callable[..., object])

_KEY = "spectral_surgery.calibration"


def _collect(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    ctx.meta.setdefault(_KEY, {})[parameter.name] = value


def calibration_options(function: F) -> F:
    """--calibrate, --samples and --seq-length; they do not reach the signature of the command."""
    function = click.option(
        "--seq-length",
        type=click.IntRange(2),
        default=256,
        show_default=True,
        help="Tokens of a sequence of --calibrate.",
        expose_value=False,
        callback=_collect,
    )(function)
    function = click.option(
        "--samples",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        help="Sequences of --calibrate at most.",
        expose_value=False,
        callback=_collect,
    )(function)
    return click.option(
        "--calibrate",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Choose codes so that outputs on this text stay right; needs the tokenizer and memory for the model.",
        expose_value=False,
        callback=_collect,
    )(function)


def run(
    ctx: click.Context,
    source: Path,
    out: Path,
    options: CompressOptions,
    *,
    workers: Team,
    threads: int,
    shard: tuple[int, int],
    resume: bool,
    overwrite: bool,
    origin: str | None,
    base: Path | None,
    progress: Progress,
) -> CompressReport | None:
    """Compress, with text where some was given.

    Raises:
        click.UsageError: when --calibrate meets --shard or --base.
    """
    from spectral_surgery.workflows import compress as workflow

    data = _data(ctx)
    if data is None:
        return workflow.compress(
            source,
            out,
            options,
            workers=workers,
            threads=threads,
            shard=shard,
            resume=resume,
            overwrite=overwrite,
            origin=origin,
            base=base,
            progress=progress,
        )
    if base is not None or shard[1] > 1:
        raise click.UsageError("--calibrate goes through a whole model in order; it has no --shard or --base.", ctx)
    from spectral_surgery.workflows.calibrate import compress_calibrated

    report, done = compress_calibrated(
        source,
        out,
        options,
        data,
        workers=workers,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        origin=origin,
        progress=progress,
    )
    worst = max(done, key=lambda own: own.output_error, default=None)
    if worst is not None:
        click.echo(
            f"{len(done)} weights calibrated; largest error of outputs {worst.output_error:.4f}, {worst.name}", err=True
        )
    return report


def _data(ctx: click.Context) -> CalibrationData | None:
    own = ctx.meta.get(_KEY, {})
    if own.get("calibrate") is None:
        return None
    from spectral_surgery.workflows.calibrate import CalibrationData

    return CalibrationData(own["calibrate"], own["samples"], own["seq_length"])
