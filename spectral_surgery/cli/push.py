"""spectral-surgery push."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command

if TYPE_CHECKING:
    from spectral_surgery.commands.push import PushReport

_SHOWN = 12  # files listed in text; --json lists all


@click.command("push", cls=Command)
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--private", is_flag=True, help="Make the repository private, should it be new.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", help="First line of the commit.")
@shared.hub_options
@click.option("--dry-run", is_flag=True, help="Check the folder, say what would be uploaded; ask nothing of the Hub.")
@shared.output_options
def command(folder: Path, repository: str, private: bool, create_pr: bool, message: str | None, dry_run: bool) -> None:
    """Check a folder and upload it to the Hub as one commit, with a model card.

    The folder is a compressed checkpoint, an adapter, or any other checkpoint in safetensors. What the Hub has already
    is not sent again: an upload that was cut off goes on when the command is repeated. A card that a person has written
    is kept; only a marked part of it is ours. A Hub without Xet storage needs HF_HUB_DISABLE_XET=1.

    \b
    Example:
      spectral-surgery push ./model-4bit org/model-4bit --private
      spectral-surgery push ./adapter org/adapter --dry-run
    """
    from spectral_surgery.commands.push import push

    access = shared.hub_access()
    with output.progress(" tensors") as progress:
        report = push(
            folder,
            repository,
            private=private,
            revision=access.revision,
            create_pr=create_pr,
            message=message,
            token=access.token,
            dry_run=dry_run,
            progress=progress,
        )
    output.show(report.to_json() | {"dry_run": dry_run}, _lines(report, dry_run=dry_run))


def _lines(report: PushReport, *, dry_run: bool) -> Iterator[str]:
    largest = sorted(report.files.items(), key=lambda item: -item[1])
    yield output.table([{"file": name, "bytes": nbytes} for name, nbytes in largest[:_SHOWN]])
    if len(largest) > _SHOWN:
        yield f"... and {len(largest) - _SHOWN} smaller ones (--json lists all)"
    for name in report.deleted:
        yield f"removed, replaced by the new files: {name}"
    yield f"\n{report.kind}: {len(report.files)} files, {output.size(report.nbytes)}, checked."
    done = f"{'Pushed' if report.changed else 'Nothing had changed'}: {report.url}"
    yield "Nothing was uploaded." if dry_run else done
