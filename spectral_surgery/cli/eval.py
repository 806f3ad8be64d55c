"""spectral-surgery eval."""

from __future__ import annotations

from pathlib import Path

import click

from spectral_surgery.cli import output, shared

CHECK_FAILED = 3
_SHOWN = 10
_FILE = click.Path(path_type=Path)


@click.command("eval")
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option("--adapter", help="Put this adapter on B; without B, compare A without and with it.")
@click.option("--text", type=_FILE, help="Perplexity and KL of language models, cosine of sentence encoders, on it.")
@click.option("--sts", type=_FILE, help="CSV of sentence pairs and scores: rank correlation of sentence encoders.")
@click.option("--samples", type=click.IntRange(0), default=0, help="Sequences, lines or pairs at most  [default: all]")
@click.option("--seq-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--max-error", type=float, help="Exit with 3 when the relative error of the weights is larger.")
@click.option("--device", default="cpu", show_default=True, help="Models run on it.")
@shared.output_options
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str | None,
    adapter: str | None,
    text: Path | None,
    sts: Path | None,
    samples: int,
    seq_length: int,
    max_error: float | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare two checkpoints, plain or compressed: tensors by their relative error and, with text, as models.

    \b
    Example:
      spectral-surgery eval ./model ./model-4bit
      spectral-surgery eval ./model ./model-4bit --text notes.txt
      spectral-surgery eval ./encoder --adapter ./adapter --sts pairs.csv
    """
    from spectral_surgery.hub import resolve
    from spectral_surgery.workflows.evaluate import EvalData, evaluate

    with output.progress(quiet=quiet, unit=" tensors") as progress:
        report = evaluate(
            resolve(a),
            resolve(b) if b else None,
            EvalData(text, sts, samples, seq_length),
            adapter=resolve(adapter) if adapter else None,
            device=device,
            progress=progress,
        )
    if as_json:
        output.print_json("eval", report.to_json())
    else:
        if report.tensors:
            click.echo(output.table([vars(tensor) for tensor in report.tensors[:_SHOWN]]))
            more = f", the {_SHOWN} worst above" if len(report.tensors) > _SHOWN else ""
            click.echo(
                f"{len(report.tensors)} tensors differ{more}; relative error {report.relative_error:.4f} together"
            )
        if b:
            click.echo(f"{report.equal} tensors are equal; {len(report.only_in_one)} are in one checkpoint only")
        if report.measures:
            click.echo(output.table([{"measure": key, "value": value} for key, value in report.measures.items()]))
    if max_error is not None and report.relative_error > max_error:
        click.echo(f"Check failed: relative error {report.relative_error:.4f} is above {max_error:g}", err=True)
        ctx.exit(CHECK_FAILED)
