"""spectral-surgery export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared
from spectral_surgery.cli.options import Command

if TYPE_CHECKING:
    from spectral_surgery.commands.export import ExportPlan, ExportReport


@click.command("export", cls=Command)
@click.argument("adapter", metavar="ADAPTER")
@shared.out_argument
@click.option(
    *("--format", "form"),
    default="lora",
    show_default=True,
    metavar="FORMAT",
    help="lora, foura, spectral_delta, ...: an adapter; delta: a checkpoint with ΔW under the name of each weight.",
)
@click.option("--base", metavar="BASE", help="The base model, for names and shapes  [default: the one ADAPTER names]")
@adapter_options.size_options
@adapter_options.setting_option
@shared.writing_options
def command(adapter: str, out: Path, form: str, base: str | None, dry_run: bool, overwrite: bool) -> None:
    """Write an adapter in another form: as a LoRA that every other tool reads, or as plain weight differences.

    FouRA becomes a LoRA exactly, unless its gate depends on the input: freeze it first. Of fourierft and
    spectral_delta a LoRA is the best approximation of a --rank, a --max-error or a number of --bytes, and the error is
    measured. --base is read for headers only, and only where the adapter does not say the shapes of its layers.
    --revision is that of ADAPTER.

    \b
    Example:
      spectral-surgery export ./foura ./lora
      spectral-surgery export ./fourierft ./lora --rank 16 --base ./model
      spectral-surgery export ./adapter ./differences --format delta
    """
    from spectral_surgery.commands import export as workflow
    from spectral_surgery.files.peft.adapter_files import read_adapter

    is_delta = form == workflow.DELTA
    size = None if is_delta else adapter_options.size_of(form)
    config = None if is_delta else adapter_options.config_of(form)
    access = shared.hub_access()
    folder = access.resolve(adapter)[0]
    state = read_adapter(folder)
    base = base or (state.spec.base_model if workflow.needs_base(state, form) else None)
    with ExitStack() as stack:
        model = stack.enter_context(access.others().outline(base)).path if base else None
        if dry_run:
            _show_plan(workflow.plan_export(folder, form, base=model, size=size), form)
            return
        access.prepare()
        progress = stack.enter_context(output.progress(" layers"))
        report = workflow.export(
            folder,
            out,
            form,
            base=model,
            size=size,
            config=config,
            dtype=adapter_options.stored_dtype(),
            overwrite=overwrite,
            origin=adapter_options.base_name(base)[0] if base else None,
            progress=progress,
        )
    output.show(report.to_json() | access.pushed(out), _lines(report, out))


def _show_plan(plan: ExportPlan, form: str) -> None:
    how = "exactly" if plan.exact else "approximately"
    lines = [
        output.table([{"layer": update.layer, "shape": update.shape} for update in plan.updates]),
        f"{plan.state.spec.method.name} would become {form}, {how}. Nothing was written.",
    ]
    output.show({"dry_run": True, **plan.to_json()}, lines)


def _lines(report: ExportReport, out: Path) -> Iterator[str]:
    yield output.table(adapter_options.layer_rows(report.layers, report.unit))
    for name in report.left_out:
        yield f"{name}: trained whole, and not a difference of weights; left out"
    how = "exact but for rounding" if report.exact else "approximate"
    yield (
        f"{report.method} as {report.form}, {how}: relative error {report.relative_error:.4g},"
        f" {output.size(report.stored_bytes)}, in {report.seconds:.1f} s: {out}"
    )
