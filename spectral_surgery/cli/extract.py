"""spectral-surgery extract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared

if TYPE_CHECKING:
    from spectral_surgery.surgery.extract import Size
    from spectral_surgery.workflows.extract import ExtractReport
    from spectral_surgery.workflows.extract_plan import ExtractPlan

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@click.command("extract")
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@shared.out_argument
@adapter_options.method_options
@click.option(
    "--bytes", "nbytes", type=int, metavar="N", help="Bytes of the adapter's file, spent where they save most."
)
@click.option("--max-error", type=float, help="Relative error of the difference of every layer, such as 0.3.")
@click.option("--rank", type=int, help="Rank of every layer: lora, foura.")
@click.option("--n-frequency", type=int, help="Coefficients of every layer: spectral_delta, fourierft.")
@click.option("--max-rank", type=int, help="At most this rank in any layer; saves time with large models.")
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of stored numbers."
)
@click.option(
    "--save-rest", is_flag=True, help="Store whole what differs and carries no adapter: norms, biases, heads."
)
@adapter_options.target_options
@shared.push_option
@shared.writing_options
@shared.output_options
def command(
    base: str,
    tuned: str,
    out: Path,
    method: str,
    settings: tuple[str, ...],
    nbytes: int | None,
    max_error: float | None,
    rank: int | None,
    n_frequency: int | None,
    max_rank: int | None,
    dtype: str,
    save_rest: bool,
    target_modules: str | None,
    exclude_modules: str | None,
    layers: str | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn the difference of two checkpoints into an adapter, tensor by tensor, without building the model.

    spectral_delta keeps the largest coefficients of a complete basis, lora and foura the largest singular values, with
    the same error at the same rank. fourierft reaches half of all matrices: its error stays near 0.7. --bytes are
    shared by the layers so that the last one saves the same everywhere. Errors are measured on what is written.

    \b
    Example:
      spectral-surgery extract ./base ./tuned ./adapter --method spectral_delta --bytes 2000000
      spectral-surgery extract ./base ./tuned ./adapter --method lora --max-error 0.3 --save-rest
    """
    from spectral_surgery.workflows import extract as workflow
    from spectral_surgery.workflows.extract_plan import plan_extraction

    options = workflow.ExtractOptions(
        method,
        size_of(method, nbytes, max_error, rank, n_frequency),
        adapter_options.config_of(method, settings),
        adapter_options.targets_of(target_modules, exclude_modules, layers),
        DTYPES[dtype],
        max_rank,
        save_rest,
        *adapter_options.base_name(base),
    )
    access = shared.hub_access(quiet=quiet)
    if not dry_run:
        access.prepare()
    before, after = access.resolve(base)[0], access.resolve(tuned)[0]
    if dry_run:
        _show_plan(plan_extraction(before, after, method, options.targets), as_json=as_json)
        return
    with output.progress(quiet=quiet, unit=" layers") as progress:
        report = workflow.extract(before, after, out, options, overwrite=overwrite, progress=progress)
    pushed = access.pushed(out)
    if as_json:
        output.print_json("extract", report.to_json() | pushed)
    else:
        show_report(report, out)


def size_of(
    method: str, nbytes: int | None, max_error: float | None, rank: int | None, n_frequency: int | None
) -> Size:
    """The one of the four options that was given.

    Raises:
        click.UsageError: when it is not one, or counts what the method does not have.
        ConfigError: when the method is unknown, or the number out of range.
    """
    from spectral_surgery.surgery.extract import EXTRACTORS, Size

    unit = EXTRACTORS[method].unit
    given = {"--bytes": nbytes, "--max-error": max_error, "--rank": rank, "--n-frequency": n_frequency}
    chosen = [(option, value) for option, value in given.items() if value is not None]
    if len(chosen) != 1:
        listed = ", ".join(option for option, _ in chosen) or "none"
        raise click.UsageError(f"one of {', '.join(given)} is needed; got {listed}.")
    (option, value), own = chosen[0], f"--{unit.replace('_', '-')}"
    if option in ("--rank", "--n-frequency") and option != own:
        raise click.UsageError(f"{option}: {method} has none; {own} is accepted.")
    if option == "--bytes":
        return Size("bytes", value)
    return Size("max_error" if option == "--max-error" else "count", value)


def show_report(report: ExtractReport, out: Path) -> None:
    """Print a table of layers, what is not covered, and the totals."""
    floors = any(layer.floor > 0 for layer in report.layers)
    rows = [
        {
            "layer": layer.layer,
            "shape": layer.shape,
            report.unit: layer.components,
            "bytes": layer.stored_bytes,
            "relative error": layer.relative_error,
            "energy kept": layer.energy_kept,
        }
        | ({"least possible error": layer.floor} if floors else {})
        for layer in report.layers
    ]
    click.echo(output.table(rows))
    for name, what in report.rest.items():
        click.echo(f"{name}: {what if what == 'saved whole' else f'differs, not covered: {what}'}")
    if any(what != "saved whole" for what in report.rest.values()):
        click.echo("Not covered tensors keep the values of BASE; --save-rest stores those it can.")
    click.echo(
        f"{report.method}: relative error {report.relative_error:.4f} of the difference of {len(rows)} matrices,"
        f" {output.size(report.stored_bytes)}, in {report.seconds:.1f} s: {out}"
    )


def _show_plan(plan: ExtractPlan, *, as_json: bool) -> None:
    if as_json:
        body = {"dry_run": True, "layers": {pair.layer: list(pair.shape) for pair in plan.pairs}, "rest": plan.rest}
        output.print_json("extract", body)
        return
    click.echo(output.table([{"layer": pair.layer, "shape": pair.shape} for pair in plan.pairs]))
    for name, reason in plan.rest.items():
        click.echo(f"{name}: differs, not covered: {reason}")
    click.echo(f"{len(plan.pairs)} matrices would be compared. Nothing was written.")
