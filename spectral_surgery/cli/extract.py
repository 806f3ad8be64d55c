"""spectral-surgery extract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared

if TYPE_CHECKING:
    from spectral_surgery.commands.extract import ExtractReport
    from spectral_surgery.commands.extract.plan import ExtractPlan


@click.command("extract")
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@shared.out_argument
@adapter_options.method_options
@adapter_options.size_options
@click.option("--max-rank", type=int, help="At most this rank in any layer; saves time with large models.")
@click.option(
    "--save-rest", is_flag=True, help="Store whole what differs and carries no adapter: norms, biases, heads."
)
@adapter_options.target_options
@shared.hub_options
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
    --revision is that of BASE.

    \b
    Example:
      spectral-surgery extract ./base ./tuned ./adapter --method spectral_delta --bytes 2000000
      spectral-surgery extract ./base ./tuned ./adapter --method lora --max-error 0.3 --save-rest
    """
    from spectral_surgery.commands import extract as workflow
    from spectral_surgery.commands.extract.plan import plan_extraction

    size = adapter_options.size_of(method, nbytes, max_error, rank, n_frequency)
    if size is None:
        raise click.UsageError("one of --bytes, --max-error, --rank and --n-frequency is needed.")
    access = shared.hub_access(quiet=quiet)
    name, revision = adapter_options.base_name(base)
    options = workflow.ExtractOptions(
        method,
        size,
        adapter_options.config_of(method, settings),
        adapter_options.targets_of(target_modules, exclude_modules, layers),
        adapter_options.DTYPES[dtype],
        max_rank,
        save_rest,
        name,
        access.revision or revision,
    )
    before, after = access.resolve(base)[0], access.others().resolve(tuned)[0]
    if dry_run:
        _show_plan(plan_extraction(before, after, method, options.targets), as_json=as_json)
        return
    access.prepare()
    with output.progress(quiet=quiet, unit=" layers") as progress:
        report = workflow.extract(before, after, out, options, overwrite=overwrite, progress=progress)
    _show_report(report, out, as_json=as_json, more=access.pushed(out))


def _show_report(report: ExtractReport, out: Path, *, as_json: bool, more: dict[str, object]) -> None:
    if as_json:
        output.print_json("extract", report.to_json() | more)
        return
    click.echo(output.table(adapter_options.layer_rows(report.layers, report.unit)))
    for name, what in report.rest.items():
        click.echo(f"{name}: {what if what == 'saved whole' else f'differs, not covered: {what}'}")
    if any(what != "saved whole" for what in report.rest.values()):
        click.echo("Not covered tensors keep the values of BASE; --save-rest stores those it can.")
    for other, name in report.tied.items():
        click.echo(
            f"tied: {other} = {name}: merging changes both; a live model of PEFT changes {name} alone. To have both"
            " there, exclude it and use --save-rest."
        )
    click.echo(
        f"{report.method}: relative error {report.relative_error:.4f} of the difference of {len(report.layers)}"
        f" matrices, {output.size(report.stored_bytes)}, in {report.seconds:.1f} s: {out}"
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
