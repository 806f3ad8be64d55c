"""spectral-surgery eval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.errors import ConfigError

if TYPE_CHECKING:
    from spectral_surgery.commands.eval import EvalReport

CHECK_FAILED = 3
_SHOWN = 10  # tensors
_FILE = click.Path(path_type=Path)
_PNG = click.Path(dir_okay=False, path_type=Path)


@click.command("eval")
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]...", nargs=-1)
@click.option("--adapter", help="Put this adapter on B; without B, compare A without and with it.")
@click.option("--text", type=_FILE, help="Perplexity and KL of language models, cosine of sentence encoders, on it.")
@click.option("--sts", type=_FILE, help="CSV of sentence pairs and scores: rank correlation of sentence encoders.")
@click.option(
    "--baseline",
    metavar="NAME,...",
    help="Judge A as baselines would leave it, too: int8, int4, int3, int2, nf4, hqq4, hqq3, hqq2, gptq4, gptq3, gptq2,"
    " prune, wanda, sparsegpt, svd, or all.",
)
@click.option("--calibrate", type=_FILE, help="Text for baselines that need some: gptq, wanda, sparsegpt.")
@click.option("--calibrate-samples", type=click.IntRange(1), default=512, show_default=True, help="Sequences of it.")
@click.option("--bits", type=float, help="Of prune, wanda, sparsegpt and svd  [default: those of each compressed B]")
@click.option("--plot", type=_PNG, metavar="FILE.png", help="Draw what each model lost over its bits per weight.")
@click.option("--samples", type=click.IntRange(0), default=0, help="Sequences, lines or pairs at most  [default: all]")
@click.option("--seq-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--max-error", type=float, help="Exit with 3 when the relative error of the weights is larger.")
@click.option("--device", default="cpu", show_default=True, help="Models run on it.")
@shared.trust_option
@shared.hub_options
@shared.output_options
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: tuple[str, ...],
    adapter: str | None,
    text: Path | None,
    sts: Path | None,
    baseline: str | None,
    calibrate: Path | None,
    calibrate_samples: int,
    bits: float | None,
    plot: Path | None,
    samples: int,
    seq_length: int,
    max_error: float | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare two checkpoints, plain or compressed: tensors by their relative error and, with text, as models.

    With several B, or with baselines, a table of all of them: bits per weight, bytes, error, measures on the text, and
    of baselines the seconds and the memory that they took to make. --plot draws it. --revision is that of A.

    \b
    Example:
      spectral-surgery eval ./model ./model-4bit
      spectral-surgery eval ./model ./model-4bit --text notes.txt
      spectral-surgery eval ./model ./model-4bit ./model-3bit --text notes.txt --baseline int8,nf4,int4,prune
      spectral-surgery eval ./model ./model-3bit --text test.txt --baseline gptq3,gptq4 --calibrate train.txt
      spectral-surgery eval ./model ./model-?bit --text test.txt --baseline all --calibrate train.txt --plot rate.png
      spectral-surgery eval ./encoder --adapter ./adapter --sts pairs.csv
    """
    from spectral_surgery.commands.eval import EvalData, Reference, evaluate
    from spectral_surgery.text.data import TextData

    if plot is not None:
        _check_plot(plot, table=len(b) > 1 or baseline is not None)
    trust = shared.trusted()
    text_to_calibrate = TextData(calibrate, calibrate_samples, trust_remote_code=trust) if calibrate else None
    names = tuple(name.strip() for name in (baseline or "").split(",") if name.strip())
    access = shared.hub_access(quiet=quiet)
    paths = [access.others().resolve(source)[0] for source in b]
    with output.progress(quiet=quiet) as progress:
        report = evaluate(
            access.resolve(a)[0],
            paths[0] if paths else None,
            EvalData(text, sts, samples, seq_length, trust),
            reference=Reference(tuple(paths[1:]), names, bits, text_to_calibrate),
            adapter=access.others().resolve(adapter)[0] if adapter else None,
            device=device,
            progress=progress,
        )
    _tell(report, as_json=as_json, plot=plot, compared=bool(b))
    if max_error is not None and report.relative_error > max_error:
        click.echo(f"Check failed: relative error {report.relative_error:.4f} is above {max_error:g}", err=True)
        ctx.exit(CHECK_FAILED)


def _check_plot(plot: Path, *, table: bool) -> None:
    """Before the long part: there is something to draw, something to draw with, and a place for it."""
    from spectral_surgery.plotting import require_matplotlib

    if not table:
        raise ConfigError("eval --plot: one model or two; several B or --baseline is accepted, whose table is drawn.")
    if not plot.parent.is_dir():
        raise ConfigError(f"eval --plot: {plot.parent} is no folder; a file in an existing one is accepted. Create it.")
    require_matplotlib()


def _tell(report: EvalReport, *, as_json: bool, plot: Path | None, compared: bool) -> None:
    if as_json:
        output.print_json("eval", report.to_json())
    else:
        click.echo("\n".join(_shown(report, compared=compared)))
    if plot is not None:
        from spectral_surgery.commands.eval.plot import plot_rate_distortion

        plot_rate_distortion(report.models, plot, report.models[0].model)
        click.echo(f"plot: {plot}", err=True)


def _shown(report: EvalReport, *, compared: bool) -> Iterator[str]:
    if report.models:
        rows = [row.to_json() for row in report.models]
        columns = dict.fromkeys(name for row in rows for name in row)  # the first is compared with none
        yield output.table(rows, list(columns))
        return
    if report.tensors:
        yield output.table([vars(tensor) for tensor in report.tensors[:_SHOWN]])
        more = f", the {_SHOWN} worst above" if len(report.tensors) > _SHOWN else ""
        yield f"{len(report.tensors)} tensors differ{more}; relative error {report.relative_error:.4f} together"
    if compared:
        yield f"{report.equal} tensors are equal; {len(report.only_in_one)} are in one checkpoint only"
    if report.measures:
        yield output.table([{"measure": key, "value": value} for key, value in report.measures.items()])
