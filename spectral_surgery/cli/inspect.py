"""spectral-surgery inspect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command

if TYPE_CHECKING:
    from spectral_surgery.commands.inspect import Inspection

_SHOWN = 6  # names of a list


@click.command("inspect", cls=Command)
@shared.source_argument
@click.option("--spectrum", is_flag=True, help="Read samples of the tensors: energy curve, error at 2, 3 and 4 bits.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Save the curves; implies --spectrum."
)
@click.option("--include", multiple=True, metavar="GLOB", help="Look only at tensors that match; repeatable.")
@shared.reading_options
@shared.hub_options
@shared.output_options
def command(source: str, spectrum: bool, plot: Path | None, include: tuple[str, ...]) -> None:
    """Show what a checkpoint holds and what compress would do with it, from headers alone.

    Of a Hub repository only the headers are fetched. With --spectrum, samples of the tensors are read too: how much
    energy the largest coefficients hold, and which error to expect at a rate.

    \b
    Example:
      spectral-surgery inspect ./model
      spectral-surgery inspect org/name
      spectral-surgery inspect ./model --plot spectrum.png
    """
    from spectral_surgery.commands import inspect as workflow

    spectrum = spectrum or plot is not None
    access = shared.hub_access()
    with output.progress(" tensors") as progress:
        found = access.locate(source, headers=not spectrum)[0]
        compare = spectrum or isinstance(found, Path)
        inspection = workflow.inspect(found, spectrum=spectrum, include=include, compare=compare, progress=progress)
    if plot is not None:
        from spectral_surgery.commands.inspect.plot import plot_spectra

        plot_spectra(inspection.spectra, plot, found.name)
    output.show(inspection.to_json(), _lines(inspection, plot))


def _lines(inspection: Inspection, plot: Path | None) -> Iterator[str]:
    yield output.table([spectrum.row() for spectrum in inspection.spectra] or inspection.tensors)
    for alias, name in inspection.tied.items():
        yield f"tied: {alias} = {name}"
    yield f"\n{inspection.kind}: {len(inspection.tensors)} tensors, {output.size(inspection.nbytes)}"
    for key, value in inspection.summary.items():
        yield f"{key}: {_brief(value)}"
    yield from output.notes(inspection.notes)
    if inspection.skipped_files:
        yield f"weights in other formats, not looked at: {', '.join(inspection.skipped_files[:5])}"
    if plot is not None:
        yield f"plot: {plot}"


def _brief(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:_SHOWN])) + (f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else "")
    return f"{value:.4f}" if isinstance(value, float) else str(value)
