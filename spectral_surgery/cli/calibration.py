"""Options of compress that bring text in: --calibrate, --heal and what belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from spectral_surgery.cli import shared
from spectral_surgery.memory import LITTLE, WORTH_KEEPING, keep_freed_memory

if TYPE_CHECKING:
    from spectral_surgery.calibration.layer_moments import CalibrationData
    from spectral_surgery.commands.compress import CompressReport
    from spectral_surgery.commands.heal import HealReport
    from spectral_surgery.files.compressed.plan import CompressOptions
    from spectral_surgery.pool import Team
    from spectral_surgery.progress import Progress
    from spectral_surgery.text.heal_text import HealData
    from spectral_surgery.training.loop import DistillSettings

F = TypeVar("F", bound=Callable[..., object])

_KEY = "spectral_surgery.calibration"
_NAMED = 3  # tensors, of those with one reason; --json names all


def _collect(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    ctx.meta.setdefault(_KEY, {})[parameter.name] = value


_setting = partial(click.option, expose_value=False, callback=_collect)
_OPTIONS = (
    _setting(
        "--calibrate",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Choose codes so that outputs on this text stay right; needs the tokenizer, and memory for one block.",
    ),
    _setting("--samples", type=click.IntRange(1), default=512, show_default=True, help="Sequences of --calibrate."),
    _setting(
        "--seq-length",
        type=click.IntRange(2),
        default=256,
        show_default=True,
        help="Tokens of a sequence of --calibrate and --heal.",
    ),
    _setting(
        "--allocation",
        type=click.Choice(["even", "slope"]),
        help="Of --calibrate and --keep important: more where one more bit or coefficient helps more, or the"
        " same for every tensor  [default: slope; even of --sparsity with --calibrate]",
    ),
    _setting(
        "--heal",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Then train the kept coefficients on this text until the model does what SOURCE does; see heal.",
    ),
    _setting(
        "--keep",
        type=click.Choice(["important", "largest"]),
        help="Of --sparsity with --heal: the coefficients that count most on the text, or the largest"
        "  [default: largest of language models, else important]",
    ),
    _setting("--steps", type=click.IntRange(1), help="Of --heal  [default: 400]"),
    _setting(
        "--minutes", type=click.FloatRange(0, min_open=True), help="Minutes that --heal trains, in place of --steps."
    ),
)


def calibration_options(function: F) -> F:
    """--calibrate, --heal and what belongs to them; they do not reach the signature of the command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


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
        click.UsageError: when --calibrate or --heal meets --shard or --base, or --keep nothing to choose from.
    """
    from spectral_surgery.commands import compress as workflow

    data, healing = _data(ctx), _healing(ctx)
    keep = ctx.meta[_KEY]["keep"]
    if keep is not None and (healing is None or data is not None):
        raise click.UsageError("--keep goes with --heal, without --calibrate, which chooses itself.", ctx)
    if data is not None:
        options = replace(options, allocation=_allocation(ctx, options, calibrated=True))
    common: dict[str, Any] = {"workers": workers, "threads": threads, "resume": resume, "overwrite": overwrite}
    common |= {"origin": origin, "progress": progress}
    blockwise = data is not None and healing is None  # healing has the whole model in memory
    keep_freed_memory(LITTLE if blockwise else WORTH_KEEPING)
    if data is None and healing is None:
        return workflow.compress(source, out, options, shard=shard, base=base, **common)
    if base is not None or shard[1] > 1:
        raise click.UsageError(
            "--calibrate and --heal go through a whole model; they have no --shard or --base. Run heal under torchrun.",
            ctx,
        )
    if healing is not None:
        from spectral_surgery.commands.compress.healed import compress_healed, keeps_important

        if data is None and keeps_important(source, options, keep):
            options = replace(options, allocation=_allocation(ctx, options, calibrated=False))
        report, healed = compress_healed(source, out, options, *healing, calibration=data, keep=keep, **common)
        _tell_reached(report)
        _tell(healed)
        return report
    from spectral_surgery.commands.compress.calibrate import compress_calibrated

    report, _ = compress_calibrated(source, out, options, cast("CalibrationData", data), **common)
    _tell_reached(report)
    return report


def _tell_reached(report: CompressReport) -> None:
    reached = report.calibration
    if reached is None:
        return
    click.echo(
        f"{reached.matrices[0]} weights calibrated, of {reached.matrices[1]}: {reached.weights[0]:,} of"
        f" {reached.weights[1]:,} numbers; largest error of outputs {reached.largest[1]:.4f}, {reached.largest[0]}",
        err=True,
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in reached.left.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = ", ..." if len(names) > _NAMED else ""
        click.echo(f"not calibrated, {reason}: {len(names)} ({', '.join(names[:_NAMED])}{more})", err=True)
    if reached.whole:
        click.echo("the model has no one list of blocks: all layers were given what the original gives them", err=True)


def _tell(healed: HealReport) -> None:
    course = healed.course
    click.echo(
        f"{healed.trained[1]:,} coefficients trained, step {course.best_step} of {course.step} kept: held-out loss"
        f" {course.held_out[0][1]:.4f} -> {course.best:.4f}",
        err=True,
    )


def _allocation(ctx: click.Context, options: CompressOptions, *, calibrated: bool) -> Any:
    """As asked; a calibrated kept set was worse for being spread."""
    even = calibrated and options.target.kind == "density"
    return ctx.meta[_KEY]["allocation"] or ("even" if even else "slope")


def _data(ctx: click.Context) -> CalibrationData | None:
    own = ctx.meta.get(_KEY, {})
    if own.get("calibrate") is None:
        return None
    from spectral_surgery.calibration.layer_moments import CalibrationData

    return CalibrationData(own["calibrate"], own["samples"], own["seq_length"], shared.trusted())


def _healing(ctx: click.Context) -> tuple[HealData, DistillSettings] | None:
    own = ctx.meta.get(_KEY, {})
    if own.get("heal") is None:
        return None
    from spectral_surgery.cli.heal import settings_of
    from spectral_surgery.text.heal_text import HealData

    given = ctx.get_parameter_source("seq_length") is not ParameterSource.DEFAULT
    data = HealData(own["heal"], seq_length=own["seq_length"] if given else 0, trust_remote_code=shared.trusted())
    return data, settings_of(own, ctx)
