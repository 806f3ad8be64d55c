"""spectral-surgery unmerge."""

from __future__ import annotations

from pathlib import Path

import click

from spectral_surgery.cli import output, shared


@click.command("unmerge")
@click.argument("merged", metavar="MERGED")
@shared.out_argument
@shared.hub_options
@shared.push_option
@shared.writing_options
@shared.output_options
def command(merged: str, out: Path, dry_run: bool, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Give back the base of a folder that `merge` wrote: every tensor bit for bit, or a refusal with the reason.

    \b
    Example:
      spectral-surgery unmerge ./model-merged ./model-again
    """
    from spectral_surgery.commands.merge import unmerge as workflow

    access = shared.hub_access(quiet=quiet)
    if not dry_run:
        access.prepare()
    path = access.resolve(merged)[0]
    if dry_run:
        from spectral_surgery.files.merge_record import read_record

        names = sorted(read_record(path).tensors)
        if as_json:
            output.print_json("unmerge", {"dry_run": True, "tensors": names})
        else:
            click.echo("\n".join([*names, f"{len(names)} tensors would be restored. Nothing was written."]))
        return
    with output.progress(quiet=quiet, unit=" tensors") as progress:
        report = workflow.unmerge(path, out, overwrite=overwrite, progress=progress)
    pushed = access.pushed(out)
    if as_json:
        output.print_json("unmerge", report.to_json() | pushed)
    else:
        dropped = f", {len(report.dropped)} added by the merge dropped" if report.dropped else ""
        click.echo(
            f"{len(report.restored)} tensors restored, checksums verified{dropped}, in {report.seconds:.1f} s: {out}"
        )
