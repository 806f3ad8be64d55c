"""spectral-surgery pull."""

from __future__ import annotations

from pathlib import Path

import click

from spectral_surgery.cli import output, shared


@click.command("pull")
@click.argument("repository", metavar="REPO")
@shared.out_argument
@click.option("--include", multiple=True, metavar="GLOB", help="Fetch only files that match, of any kind; repeatable.")
@shared.hub_options
@shared.writing_options
@shared.output_options
def command(
    repository: str,
    out: Path,
    include: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Download a checkpoint or an adapter from the Hub into a folder, and check it.

    Weights in safetensors and the files beside them are fetched, no other formats. Every file must have the hash the
    Hub lists, and of a compressed checkpoint every checksum must fit. OUT appears at the end, whole; a pull that was
    cut off goes on when the command is repeated.

    \b
    Example:
      spectral-surgery pull org/model-4bit ./model-4bit
      spectral-surgery pull org/model ./tokenizer --include 'tokenizer*'
    """
    from spectral_surgery.commands.pull import pull

    access = shared.hub_access(quiet=quiet)
    with output.progress(quiet=quiet, unit=" tensors") as progress:
        report = pull(
            repository,
            out,
            include=include,
            revision=access.revision,
            token=access.token,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        output.print_json("pull", report.to_json() | {"dry_run": dry_run})
        return
    click.echo(output.table([{"file": name, "bytes": nbytes} for name, nbytes in report.files.items()]))
    click.echo(f"\n{report.repository} at {report.commit}: {len(report.files)} files, {output.size(report.nbytes)}")
    click.echo("Nothing was written." if dry_run else f"Checked: {out}")
