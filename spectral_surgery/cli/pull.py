"""spectral-surgery pull."""

from __future__ import annotations

from pathlib import Path

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command


@click.command("pull", cls=Command)
@click.argument("repository", metavar="REPO")
@shared.out_argument
@click.option("--include", multiple=True, metavar="GLOB", help="Fetch only files that match, of any kind; repeatable.")
@shared.hub_options
@shared.overwrite_option
@shared.dry_run_option
@shared.output_options
def command(repository: str, out: Path, include: tuple[str, ...], dry_run: bool, overwrite: bool) -> None:
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

    access = shared.hub_access()
    with output.progress(" tensors") as progress:
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
    lines = [
        output.table([{"file": name, "bytes": nbytes} for name, nbytes in report.files.items()]),
        f"\n{report.repository} at {report.commit}: {len(report.files)} files, {output.size(report.nbytes)}",
        "Nothing was written." if dry_run else f"Checked: {out}",
    ]
    output.show(report.to_json() | {"dry_run": dry_run}, lines)
