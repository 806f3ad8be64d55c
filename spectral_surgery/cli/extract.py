"""spectral-surgery extract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared
from spectral_surgery.cli.options import Command, from_options
from spectral_surgery.targets import ModuleTargets

if TYPE_CHECKING:
    from spectral_surgery.commands.extract import ExtractReport
    from spectral_surgery.commands.extract.plan import ExtractPlan


@click.command("extract", cls=Command)
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
@shared.reading_options
@shared.writing_options
def command(
    base: str, tuned: str, out: Path, method: str, max_rank: int | None, save_rest: bool, dry_run: bool, overwrite: bool
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

    size = adapter_options.size_of(method)
    if size is None:
        raise click.UsageError("expected one of --bytes, --max-error, --rank and --n-frequency, got none.")
    access = shared.hub_access()
    name, revision = adapter_options.base_name(base)
    options = workflow.ExtractOptions(
        method,
        size,
        adapter_options.config_of(method),
        from_options(ModuleTargets),
        adapter_options.stored_dtype(),
        max_rank,
        save_rest,
        name,
        access.revision or revision,
    )
    before, after = access.locate(base)[0], access.others().locate(tuned)[0]
    if dry_run:
        _show_plan(plan_extraction(before, after, method, options.targets))
        return
    access.prepare()
    with output.progress(" layers") as progress:
        report = workflow.extract(before, after, out, options, overwrite=overwrite, progress=progress)
    output.show(report.to_json() | access.pushed(out), _lines(report, out))


def _lines(report: ExtractReport, out: Path) -> Iterator[str]:
    yield output.table(adapter_options.layer_rows(report.layers, report.unit))
    for name, what in report.rest.items():
        yield f"{name}: {what if what == 'saved whole' else f'differs, not covered: {what}'}"
    if any(what != "saved whole" for what in report.rest.values()):
        yield "Not covered tensors keep the values of BASE; --save-rest stores those it can."
    for other, name in report.tied.items():
        yield (
            f"tied: {other} = {name}: merging changes both; a live model of PEFT changes {name} alone. To have both"
            " there, exclude it and use --save-rest."
        )
    yield (
        f"{report.method}: relative error {report.relative_error:.4f} of the difference of {len(report.layers)}"
        f" matrices, {output.size(report.stored_bytes)}, in {report.seconds:.1f} s: {out}"
    )


def _show_plan(plan: ExtractPlan) -> None:
    lines = [
        output.table([{"layer": pair.layer, "shape": pair.shape} for pair in plan.pairs]),
        *(f"{name}: differs, not covered: {reason}" for name, reason in plan.rest.items()),
        f"{len(plan.pairs)} matrices would be compared. Nothing was written.",
    ]
    output.show({"dry_run": True, **plan.to_json()}, lines)
