"""spectral-surgery report."""

from __future__ import annotations

from pathlib import Path

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command


@click.command("report", cls=Command)
@click.argument("folder", metavar="FOLDER")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE.html",
    help="The page to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace the page.")
@shared.hub_options
@shared.output_options
def command(folder: str, out: Path, overwrite: bool) -> None:
    """Write an HTML page about FOLDER: how it was made, where its bytes are, what it lost, how training went.

    FOLDER is compressed, an adapter, merged, swapped or trained; or a file with what `eval --json` printed. The page is
    one file that needs no network: charts, tables that sort by a click, readable on a telephone, in the dark and on
    paper.

    \b
    Example:
      spectral-surgery report ./model-4bit -o report.html
      spectral-surgery eval ./model ./model-4bit --text notes.txt --baseline int4,nf4 --json > eval.json
      spectral-surgery report eval.json -o eval.html
    """
    from spectral_surgery.commands.report import report

    path, origin = shared.hub_access().resolve(folder)
    done = report(path, out, title=origin, overwrite=overwrite)
    sections = ", ".join(section.title for section in done.page.sections)
    output.show(done.to_json(), [f"{done.page.kind}: {sections}", f"{output.size(done.nbytes)}: {out}"])
