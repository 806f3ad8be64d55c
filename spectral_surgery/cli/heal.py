"""spectral-surgery heal."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.distributed import rank
from spectral_surgery.memory import LITTLE, keep_freed_memory

if TYPE_CHECKING:
    from spectral_surgery.commands.heal import HealReport

_KEY = "spectral_surgery.heal"


def _collect(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    ctx.meta.setdefault(_KEY, {})[parameter.name] = value


_setting = partial(click.option, expose_value=False, callback=_collect)


@click.command("heal")
@click.argument("compressed", metavar="COMPRESSED")
@click.argument("teacher", metavar="TEACHER")
@shared.out_argument
@_setting(
    "--data", type=click.Path(path_type=Path), required=True, help="Text, .jsonl or .csv file; a part is held out."
)
@_setting("--steps", type=click.IntRange(1), help="Optimizer steps  [default: 400]")
@_setting(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Minutes to train, evaluations included, in place of --steps.",
)
@_setting("--batch-size", type=click.IntRange(1), help="Sequences of a step and process  [default: 4 or 24]")
@_setting("--seq-length", type=click.IntRange(2), help="Tokens of a sequence  [default: 256 or 128]")
@_setting("--learning-rate", "--lr", type=float, help="In units of a weight's coefficients  [default: 0.03]")
@_setting("--eval-every", type=click.IntRange(1), help="Steps between evaluations  [default: 50]")
@_setting("--patience", type=click.IntRange(0), help="Evaluations without improvement before stopping  [default: 4]")
@_setting("--seed", type=int, help="Of the batches  [default: 0]")
@_setting(
    "--blocks",
    is_flag=True,
    help="One block after the other: little memory; --steps are those of a block, --minutes of all.",
)
@_setting("--bf16", is_flag=True, help="Compute in bfloat16.")
@_setting("--device", default="cpu", show_default=True, help="cpu or, without --blocks, cuda")
@click.option("--resume", is_flag=True, help="Go on with unfinished work of the same models, text and settings.")
@shared.threads_option
@shared.trust_option
@shared.hub_options
@shared.push_option
@click.option("--overwrite", is_flag=True, help="Replace OUT, and discard unfinished work.")
@shared.output_options
@click.pass_context
def command(
    ctx: click.Context,
    compressed: str,
    teacher: str,
    out: Path,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train the kept coefficients, biases and norms of COMPRESSED until it does what TEACHER does; write OUT.

    The result is of the same format and about the same size. Positions and steps stay as they are, and the quantiser is
    in the loop, so what is stored is what was trained. Runs under torchrun. --revision is that of COMPRESSED.

    \b
    Example:
      spectral-surgery heal ./model-20percent ./model ./model-healed --data notes.txt --minutes 5
    """
    from spectral_surgery.commands import heal as workflow
    from spectral_surgery.run import Run
    from spectral_surgery.text.data import TextData

    own = ctx.meta[_KEY]
    if own["blocks"]:
        keep_freed_memory(LITTLE)
    data = TextData(own["data"], 0, own["seq_length"] or 0, own["batch_size"] or 0, shared.trusted())
    access = shared.hub_access(quiet=quiet)
    first = join_launcher()
    if first:
        access.prepare()
    path, _ = access.resolve(compressed)
    original, origin = access.others().resolve(teacher)
    with output.progress(quiet=quiet or not first, unit=" steps") as progress:
        report = workflow.heal(
            path,
            original,
            out,
            data,
            settings_of(own, ctx),
            blocks=own["blocks"],
            device=own["device"],
            run=Run(1, shared.threads_or_all(threads), resume, overwrite, origin, progress),
        )
    if first:
        show(report, out, access.pushed(out), as_json=as_json)


def settings_of(own: dict[str, Any], ctx: click.Context) -> Any:
    """The settings that options give.

    Args:
        own: values of --steps, --minutes and the others, None where not given.
        ctx: of the command.

    Raises:
        click.UsageError: when both --steps and --minutes are given.
    """
    from dataclasses import fields

    from spectral_surgery.training.loop import DistillSettings

    if own.get("steps") and own.get("minutes"):
        raise click.UsageError("one of --steps and --minutes is accepted, not both.", ctx)
    given = {f.name: own[f.name] for f in fields(DistillSettings) if own.get(f.name) is not None}
    return DistillSettings(**given | ({"steps": 0} if own.get("minutes") else {}))


def join_launcher() -> bool:
    """Join the other processes that torchrun started, if it did; whether this one is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo")
    return rank() == 0


def show(report: HealReport, out: Path, pushed: dict[str, object], *, as_json: bool) -> None:
    """Print what healing did."""
    if as_json:
        output.print_json("heal", report.to_json() | pushed)
        return
    rows: list[dict[str, object]] = [
        {"block": name, "held-out error before": sides[0], "after": sides[1]} for name, sides in report.blocks.items()
    ]
    rows = rows or [{"step": step, "held-out loss": loss} for step, loss in report.curve.held_out]
    click.echo(output.table(rows))
    total, curve = report.manifest.report, report.curve
    click.echo(
        f"\n{report.trained[1]:,} coefficients of {report.trained[0]} weights trained, step {curve.best_step} kept:"
        f" held-out loss {curve.held_out[0][1]:.4f} -> {curve.best:.4f}.\n"
        f"{total.bits_per_weight:.3f} bits per weight, density {total.density:.3f}, in {report.seconds:.0f} s: {out}"
    )
    if report.untrained:
        names = ", ".join(report.untrained[:3])
        click.echo(f"left as they were: {len(report.untrained)} tensors ({names})", err=True)
