"""spectral-surgery merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared

if TYPE_CHECKING:
    from spectral_surgery.commands.merge import MergeReport
    from spectral_surgery.commands.merge.plan import MergePlan


@click.command("merge")
@click.argument("base", metavar="BASE")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@shared.out_argument
@click.option("--weights", help="Factor of each adapter, separated by commas  [default: 1 for each]")
@shared.hub_options
@shared.push_option
@shared.writing_options
@shared.output_options
def command(
    base: str,
    adapters: tuple[str, ...],
    out: Path,
    weights: str | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Add adapters to the weights of BASE, tensor by tensor, without building the model.

    Updates are added in float32 and cast once. A lossless record beside the weights lets `unmerge` give back BASE bit
    for bit. Adapters are PEFT folders: FourierFT, LoRA (DoRA, biases, experts, trained tokens, resized embeddings too)
    and the other methods of this tool. --revision is that of BASE.

    \b
    Example:
      spectral-surgery merge ./model ./adapter ./model-merged
      spectral-surgery merge ./model ./style ./task ./both --weights 0.5,1
      spectral-surgery merge org/model org/adapter ./merged --push org/model-merged --private
    """
    from spectral_surgery.commands import merge as workflow
    from spectral_surgery.commands.merge.plan import plan_merge

    factors = _numbers(weights)
    access = shared.hub_access(quiet=quiet)
    if not dry_run:
        access.prepare()
    others = access.others()
    (root, origin), folders = access.resolve(base), [others.resolve(adapter)[0] for adapter in adapters]
    if dry_run:
        _show_plan(plan_merge(root, folders, factors), as_json=as_json)
        return
    with output.progress(quiet=quiet, unit=" tensors") as progress:
        report = workflow.merge(
            root, folders, out, weights=factors, overwrite=overwrite, origin=origin, progress=progress
        )
    _show_report(report, out, as_json=as_json, more=access.pushed(out))


def _show_report(report: MergeReport, out: Path, *, as_json: bool, more: dict[str, object]) -> None:
    if as_json:
        output.print_json("merge", report.to_json() | more)
        return
    rows = [{"tensor": name, "update / weight": size} for name, size in report.layers.items()]
    click.echo(output.table(rows))
    for alias, name in report.tied.items():
        click.echo(f"tied: {alias} = {name}, changed together")
    _say_embeddings(report)
    share = report.undo_bytes / max(report.merged_bytes, 1)
    click.echo(
        f"{len(report.layers)} weights, {output.size(report.merged_bytes)}, in {report.seconds:.1f} s;"
        f" record for unmerge {output.size(report.undo_bytes)} ({share:.1%}): {out}"
    )


def _say_embeddings(done: MergeReport | MergePlan) -> None:
    if done.untied:
        click.echo(f"untied: {', '.join(done.untied)}: different tensors now, tie_word_embeddings is false")
    for name, (before, after) in done.resized.items():
        click.echo(f"resized: {name} from {before} to {after} rows, and vocab_size")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text}' is no list of numbers such as 1,0.5.", param_hint="--weights") from None


def _show_plan(plan: MergePlan, *, as_json: bool) -> None:
    changed = {name: target for name, target in plan.targets.items() if target.sources}
    if as_json:
        body = {
            "dry_run": True,
            "tensors": {name: [plan.weights[s.number] for s in t.sources] for name, t in changed.items()},
            "replaced": list(plan.replaced),
            "tied": plan.tied,
            "untied": list(plan.untied),
            "resized": {name: list(rows) for name, rows in plan.resized.items()},
        }
        output.print_json("merge", body)
        return
    rows = [
        {"tensor": name, "shape": t.shape, "adapters": len({source.number for source in t.sources})}
        for name, t in changed.items()
    ]
    click.echo(output.table(rows))
    for name in plan.replaced:
        part = ", in rows" if plan.targets[name].rows and not plan.targets[name].replaced else " whole"
        click.echo(f"replaced{part}: {name}")
    for alias, name in plan.tied.items():
        click.echo(f"tied: {alias} = {name}, changed together")
    _say_embeddings(plan)
    click.echo(f"{len(rows)} weights would be changed. Nothing was written.")
