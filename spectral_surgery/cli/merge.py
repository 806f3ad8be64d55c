"""spectral-surgery merge and unmerge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command, factors

if TYPE_CHECKING:
    from spectral_surgery.commands.merge import MergeReport
    from spectral_surgery.commands.merge.plan import MergePlan


@click.command("merge", cls=Command)
@click.argument("base", metavar="BASE")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@shared.out_argument
@click.option("--weights", type=factors, help="Factor of each adapter, separated by commas  [default: 1 for each]")
@shared.reading_options
@shared.writing_options
def command(
    base: str, adapters: tuple[str, ...], out: Path, weights: list[float] | None, dry_run: bool, overwrite: bool
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

    access = shared.hub_access()
    if not dry_run:
        access.prepare()
    others = access.others()
    (root, origin), folders = access.locate(base, headers=dry_run), [others.resolve(adapter)[0] for adapter in adapters]
    if dry_run:
        plan = plan_merge(root, folders, weights)
        output.show({"dry_run": True, **plan.to_json()}, _plan_lines(plan))
        return
    with output.progress(" tensors") as progress:
        report = workflow.merge(
            root, folders, out, weights=weights, overwrite=overwrite, origin=origin, progress=progress
        )
    output.show(report.to_json() | access.pushed(out), _report_lines(report, out))


def _report_lines(report: MergeReport, out: Path) -> Iterator[str]:
    yield output.table([{"tensor": name, "update / weight": size} for name, size in report.layers.items()])
    yield from _embedding_lines(report)
    share = report.undo_bytes / max(report.merged_bytes, 1)
    yield (
        f"{len(report.layers)} weights, {output.size(report.merged_bytes)}, in {report.seconds:.1f} s;"
        f" record for unmerge {output.size(report.undo_bytes)} ({share:.1%}): {out}"
    )


def _embedding_lines(done: MergeReport | MergePlan) -> Iterator[str]:
    for alias, name in done.tied.items():
        yield f"tied: {alias} = {name}, changed together"
    if done.untied:
        yield f"untied: {', '.join(done.untied)}: different tensors now, tie_word_embeddings is false"
    for name, (before, after) in done.resized.items():
        yield f"resized: {name} from {before} to {after} rows, and vocab_size"


def _plan_lines(plan: MergePlan) -> Iterator[str]:
    rows = [
        {"tensor": name, "shape": target.shape, "adapters": len({source.number for source in target.sources})}
        for name, target in plan.targets.items()
        if target.sources
    ]
    yield output.table(rows)
    for name in plan.replaced:
        how = ", in rows" if plan.targets[name].rows and not plan.targets[name].replaced else " whole"
        yield f"replaced{how}: {name}"
    yield from _embedding_lines(plan)
    yield f"{len(rows)} weights would be changed. Nothing was written."


@click.command("unmerge", cls=Command)
@click.argument("merged", metavar="MERGED")
@shared.out_argument
@shared.writing_options
def unmerge(merged: str, out: Path, dry_run: bool, overwrite: bool) -> None:
    """Give back the base of a folder that `merge` wrote: every tensor bit for bit, or a refusal with the reason.

    \b
    Example:
      spectral-surgery unmerge ./model-merged ./model-again
    """
    from spectral_surgery.commands.merge import unmerge as workflow
    from spectral_surgery.files.merge_record import read_record

    access = shared.hub_access()
    if not dry_run:
        access.prepare()
    path = access.resolve(merged)[0]
    if dry_run:
        names = sorted(read_record(path).tensors)
        lines = [*names, f"{len(names)} tensors would be restored. Nothing was written."]
        output.show({"dry_run": True, "tensors": names}, lines)
        return
    with output.progress(" tensors") as progress:
        report = workflow.unmerge(path, out, overwrite=overwrite, progress=progress)
    dropped = f", {len(report.dropped)} added by the merge dropped" if report.dropped else ""
    line = f"{len(report.restored)} tensors restored, checksums verified{dropped}, in {report.seconds:.1f} s: {out}"
    output.show(report.to_json() | access.pushed(out), [line])
