"""Options of compress that bring text in: --calibrate, --heal and what belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from spectral_surgery.cli import shared
from spectral_surgery.memory import LITTLE, WORTH_KEEPING, keep_freed_memory

if TYPE_CHECKING:
    from spectral_surgery.commands.compress import CompressReport, Healing
    from spectral_surgery.commands.heal import HealReport
    from spectral_surgery.files.compressed.plan import CompressOptions
    from spectral_surgery.text.data import TextData

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


def texts(
    ctx: click.Context, options: CompressOptions, shard: tuple[int, int]
) -> tuple[CompressOptions, TextData | None, Healing | None]:
    """What the options of text say, with --allocation in the options of compress.

    Raises:
        click.UsageError: when --keep has nothing to choose from, or a shard is asked for text.
    """
    calibrate, heal, given = _data(ctx), _healing(ctx), ctx.meta[_KEY]
    if given["keep"] is not None and (heal is None or calibrate is not None):
        raise click.UsageError("--keep goes with --heal, without --calibrate, which chooses itself.", ctx)
    if shard[1] > 1 and (calibrate or heal):
        raise click.UsageError(
            "--calibrate and --heal go through a whole model; they have no --shard. Run heal under torchrun.", ctx
        )
    blockwise = calibrate is not None and heal is None  # healing has the whole model in memory
    keep_freed_memory(LITTLE if blockwise else WORTH_KEEPING)
    return replace(options, allocation=given["allocation"]), calibrate, heal


def show_text(report: CompressReport | None) -> None:
    """Print what text was good for, where there was some."""
    if report is None:
        return
    _tell_reached(report)
    if report.healing is not None:
        _tell(report.healing)


def _tell_reached(report: CompressReport) -> None:
    reached = report.calibration
    if reached is None:
        return
    click.echo(
        f"{reached.matrices[0]} weights calibrated, of {reached.matrices[1]}: {reached.weights[0]:,} of"
        f" {reached.weights[1]:,} numbers; largest error of outputs {reached.largest.output_error:.4f},"
        f" {reached.largest.name}",
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
    curve = healed.curve
    click.echo(
        f"{healed.trained[1]:,} coefficients trained, step {curve.best_step} of {curve.step} kept: held-out loss"
        f" {curve.held_out[0][1]:.4f} -> {curve.best:.4f}",
        err=True,
    )


def _data(ctx: click.Context) -> TextData | None:
    own = ctx.meta.get(_KEY, {})
    if own.get("calibrate") is None:
        return None
    from spectral_surgery.text.data import TextData

    return TextData(own["calibrate"], own["samples"], own["seq_length"], trust_remote_code=shared.trusted())


def _healing(ctx: click.Context) -> Healing | None:
    own = ctx.meta.get(_KEY, {})
    if own.get("heal") is None:
        return None
    from spectral_surgery.cli.heal import settings_of
    from spectral_surgery.commands.compress import Healing
    from spectral_surgery.text.data import TextData

    given = ctx.get_parameter_source("seq_length") is not ParameterSource.DEFAULT
    data = TextData(own["heal"], seq_length=own["seq_length"] if given else 0, trust_remote_code=shared.trusted())
    return Healing(data, settings_of(own, ctx), own["keep"])
