"""spectral-surgery heal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command, from_options, only_one, options_of
from spectral_surgery.memory import LITTLE, keep_freed_memory
from spectral_surgery.run import Run
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings

if TYPE_CHECKING:
    from spectral_surgery.commands.heal import HealReport


@click.command("heal", cls=Command)
@click.argument("compressed", metavar="COMPRESSED")
@click.argument("teacher", metavar="TEACHER")
@shared.out_argument
@options_of(TextData, "file", flags={"file": "--data"})
@options_of(DistillSettings, "steps", "minutes")
@options_of(TextData, "batch_size", "seq_length", "unreadable")
@options_of(DistillSettings, "learning_rate", "eval_every", "patience", "seed")
@click.option(
    "--blocks",
    is_flag=True,
    help="One block after the other: little memory; --steps are those of a block, --minutes of all.",
)
@options_of(DistillSettings, "bf16")
@click.option("--device", default="cpu", show_default=True, help="cpu or, without --blocks, cuda.")
@options_of(Run, "resume")
@shared.threads_option
@options_of(TextData, "trust_remote_code")
@shared.hub_options
@shared.push_options
@shared.overwrite_option
@shared.output_options
def command(compressed: str, teacher: str, out: Path, blocks: bool, device: str, as_json: bool, quiet: bool) -> None:
    """Train the kept coefficients, biases and norms of COMPRESSED until it does what TEACHER does; write OUT.

    The result is of the same format and about the same size. Positions and steps stay as they are, and the quantiser is
    in the loop, so what is stored is what was trained. Runs under torchrun. --revision is that of COMPRESSED.

    \b
    Example:
      spectral-surgery heal ./model-20percent ./model ./model-healed --data notes.txt --minutes 5
    """
    from spectral_surgery.commands import heal as workflow

    only_one("steps", "minutes")
    if blocks:
        keep_freed_memory(LITTLE)
    data, settings, access = from_options(TextData), from_options(DistillSettings), shared.hub_access()
    first = join_launcher()
    if first:
        access.prepare()
    path, _ = access.resolve(compressed)
    original, origin = access.others().resolve(teacher)
    with output.progress(" steps", quiet=quiet or not first) as progress:
        more = {"threads": shared.threads_or_all(), "origin": origin, "progress": progress, "note": output.note}
        report = workflow.heal(
            path, original, out, data, settings, blocks=blocks, device=device, run=from_options(Run, more)
        )
    if first:
        output.show(report.to_json() | access.pushed(out), _lines(report, out))
        if report.untrained and not as_json:
            names = ", ".join(report.untrained[:3])
            click.echo(f"left as they were: {len(report.untrained)} tensors ({names})", err=True)


def join_launcher() -> bool:
    """Join the other processes that torchrun started, if it did; whether this one is the first."""
    from spectral_surgery.distributed import rank

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo")
    return rank() == 0


def _lines(report: HealReport, out: Path) -> Iterator[str]:
    rows: list[dict[str, object]] = [
        {"block": name, "held-out error before": sides[0], "after": sides[1]} for name, sides in report.blocks.items()
    ]
    yield output.table(rows or [{"step": step, "held-out loss": loss} for step, loss in report.curve.held_out])
    total, curve = report.manifest.report, report.curve
    yield (
        f"\n{report.trained[1]:,} coefficients of {report.trained[0]} weights trained, step {curve.best_step} kept:"
        f" held-out loss {curve.held_out[0][1]:.4f} -> {curve.best:.4f}.\n"
        f"{total.bits_per_weight:.3f} bits per weight, density {total.density:.3f}, in {report.seconds:.0f} s: {out}"
    )
