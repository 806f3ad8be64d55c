"""spectral-surgery export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared
from spectral_surgery.cli.options import Command
from spectral_surgery.memory import keep_freed_memory

if TYPE_CHECKING:
    from spectral_surgery.commands.export import ExportPlan, ExportReport, ModelExport, ModelPlan

_SIZES = ("nbytes", "max_error", "rank", "n_frequency")
_SHOWN = 12  # tensors in the table; --json has all


@click.command("export", cls=Command)
@shared.source_argument
@shared.out_argument
@click.option(
    "--to",
    default="lora",
    show_default=True,
    metavar="TARGET",
    help="Of an adapter: lora, foura, spectral_delta, ..., or delta. Of a model: compressed-tensors, gguf, ..."
    " `spectral-surgery methods` lists all.",
)
@click.option(
    "--base",
    metavar="BASE",
    help="Of an adapter: the base model, for names and shapes  [default: the one it names]. Of a compressed model: what"
    " it was compressed from, to measure errors against.",
)
@adapter_options.size_options
@adapter_options.setting_option
@shared.threads_option
@shared.reading_options
@shared.writing_options
def command(source: str, out: Path, to: str, base: str | None, dry_run: bool, overwrite: bool) -> None:
    """Write a model in the format of another program, or an adapter in another form.

    A model, compressed or plain, becomes a folder for vLLM and transformers (compressed-tensors), or a file for
    llama.cpp (gguf): weights are decoded, and rounded once more. Errors are measured.

    An adapter becomes a LoRA that every other tool reads, or plain weight differences (delta). FouRA becomes a LoRA
    exactly, unless its gate depends on the input: freeze it first. Of fourierft and spectral_delta a LoRA is the best
    approximation of a --rank, a --max-error or a number of --bytes. --base is read for headers only, and only where
    the adapter does not say the shapes of its layers.

    -o sets what `spectral-surgery methods TARGET` lists. --revision is that of SOURCE.

    \b
    Example:
      spectral-surgery export ./model-4bit ./served --to compressed-tensors
      spectral-surgery export ./model-4bit ./for-llama --to gguf -o type=Q4_0
      spectral-surgery export ./foura ./lora
      spectral-surgery export ./fourierft ./lora --rank 16 --base ./model
      spectral-surgery export ./adapter ./differences --to delta
    """
    from spectral_surgery.commands.export import TARGETS, ModelTarget

    if isinstance(TARGETS[to], ModelTarget):
        _export_model(source, out, to, base, dry_run, overwrite)
    else:
        _export_adapter(source, out, to, base, dry_run, overwrite)


def _export_model(source: str, out: Path, to: str, base: str | None, dry_run: bool, overwrite: bool) -> None:
    from spectral_surgery.commands import export as workflow
    from spectral_surgery.options import parse_settings

    params = click.get_current_context().params
    sizes = [name for name in _SIZES if params[name] is not None]
    if sizes:
        raise click.UsageError(f"--{sizes[0].replace('_', '-')}: expected an adapter, got a model. Set {to} with -o.")
    settings = parse_settings(workflow.model_target(to).config, params["settings"])
    keep_freed_memory()
    access = shared.hub_access()
    if dry_run:
        _show_model_plan(workflow.plan_model(access.locate(source, headers=True)[0], to, settings), to)
        return
    found, origin = access.prepare().locate(source)
    with output.progress(" tensors") as progress:
        report = workflow.export_model(
            found,
            out,
            to,
            settings,
            original=access.others().locate(base)[0] if base else None,
            threads=shared.threads_or_all(),
            overwrite=overwrite,
            origin=origin,
            progress=progress,
        )
    output.show(report.to_json() | access.pushed(out), _model_lines(report, out))


def _show_model_plan(plan: ModelPlan, to: str) -> None:
    types = plan.converted.values()
    counts = {kind: sum(kind == other for other in types) for kind in dict.fromkeys(types)}
    lines = [f"{count} tensors as {kind}" for kind, count in counts.items()]
    lines += [f"{len(plan.kept)} tensors keep their values", *plan.notes, f"to {to}. Nothing was written."]
    body = {"target": to, "tensors": dict(plan.converted), "kept": dict(plan.kept), "notes": list(plan.notes)}
    output.show({"dry_run": True, **body}, lines)


def _model_lines(report: ModelExport, out: Path) -> Iterator[str]:
    largest = sorted(report.tensors, key=lambda tensor: -tensor.nbytes)
    rows = [
        {
            "tensor": tensor.name,
            "shape": tensor.shape,
            "stored as": tensor.stored_as,
            "error of compressing": tensor.compressed_error,
            "of the export": tensor.export_error,
        }
        | ({} if tensor.total_error is None else {"of both": tensor.total_error})
        for tensor in largest[:_SHOWN]
    ]
    yield output.table(rows)
    if len(largest) > _SHOWN:
        yield f"... and {len(largest) - _SHOWN} smaller ones (--json lists all)"
    yield f"{len(report.kept)} tensors keep their values."
    for note in report.notes:
        yield f"note: {note}"
    both = "" if report.total_error is None else f", {report.total_error:.4g} against the original"
    yield (
        f"{report.target}: {len(report.tensors)} tensors, relative error {report.export_error:.4g} against what was"
        f" exported{both}, {output.size(report.stored_bytes)}, in {report.seconds:.1f} s: {out}"
    )


def _export_adapter(adapter: str, out: Path, form: str, base: str | None, dry_run: bool, overwrite: bool) -> None:
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
        model = access.others().locate(base, headers=True)[0] if base else None
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
