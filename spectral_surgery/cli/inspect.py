"""spectral-surgery inspect."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from spectral_surgery.cli import output, shared

_SHOWN = 6  # names of a list


@click.command("inspect")
@shared.source_argument
@click.option("--spectrum", is_flag=True, help="Read samples of the tensors: energy curve, error at 2, 3 and 4 bits.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Save the curves; implies --spectrum."
)
@click.option("--include", multiple=True, metavar="GLOB", help="Look only at tensors that match; repeatable.")
@shared.hub_options
@shared.output_options
def command(
    source: str,
    spectrum: bool,
    plot: Path | None,
    include: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
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
    access = shared.hub_access(quiet=quiet)
    with ExitStack() as stack:
        progress = stack.enter_context(output.progress(quiet=quiet, unit=" tensors"))
        if spectrum:
            path, whole = access.resolve(source)[0], True
        else:
            outline = stack.enter_context(access.outline(source))
            path, whole = outline.path, outline.whole
        found = workflow.inspect(path, spectrum=spectrum, include=include, compare=whole, progress=progress)
    if plot is not None:
        from spectral_surgery.commands.inspect.plot import plot_spectra

        plot_spectra(found.spectra, plot, path.name)
    if as_json:
        output.print_json("inspect", found.to_json())
        return
    if found.spectra:
        click.echo(output.table([s.row() for s in found.spectra]))
    else:
        click.echo(output.table(found.tensors))
    for alias, name in found.tied.items():
        click.echo(f"tied: {alias} = {name}")
    click.echo(f"\n{found.kind}: {len(found.tensors)} tensors, {output.size(found.nbytes)}")
    for key, value in found.summary.items():
        click.echo(f"{key}: {_brief(value)}")
    output.notes(found.notes)
    if found.skipped_files:
        click.echo(f"weights in other formats, not looked at: {', '.join(found.skipped_files[:5])}")
    if plot is not None:
        click.echo(f"plot: {plot}")


def _brief(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:_SHOWN])) + (f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else "")
    return f"{value:.4f}" if isinstance(value, float) else str(value)
