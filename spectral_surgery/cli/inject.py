"""spectral-surgery inject."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared
from spectral_surgery.cli.options import Command

if TYPE_CHECKING:
    from spectral_surgery.commands.inject import InjectPlan


@click.command("inject", cls=Command)
@shared.source_argument
@shared.out_argument
@adapter_options.method_options
@adapter_options.target_options
@adapter_options.trained_options
@click.option("--seed", default=0, show_default=True, help="Seed of the random starts.")
@shared.writing_options
def command(source: str, out: Path, bias: str, seed: int, dry_run: bool, overwrite: bool) -> None:
    """Write a fresh, untrained adapter for SOURCE, in PEFT's format, from its configuration and the headers of files.

    It changes nothing until it is trained. Without --target-modules the usual ones of the architecture are taken, such
    as q_proj and v_proj; all-linear means the linear layers of the model without its head and fused experts, and what
    is left out is said. The head of a classifier is copied, to be trained whole. --dry-run lists all this; of a Hub
    repository it fetches headers only.

    \b
    Example:
      spectral-surgery inject ./model ./adapter --method fourierft -o n_frequency=2000 --target-modules q_proj,v_proj
      spectral-surgery inject org/name ./adapter --method foura --target-modules all-linear --dry-run
    """
    from spectral_surgery.commands import inject as workflow

    access = shared.hub_access()
    spec = adapter_options.spec_of(source, access.revision, bias)
    if dry_run:
        plan = workflow.plan_injection(access.locate(source, headers=True)[0], spec)
        output.show(plan.to_json() | {"dry_run": True}, _lines(plan))
        output.nothing_written()
        return
    access.prepare()
    with output.progress(" layers") as progress:
        plan = workflow.inject(access.resolve(source)[0], out, spec, seed=seed, overwrite=overwrite, progress=progress)
    output.show(plan.to_json() | access.pushed(out), _lines(plan))


def _lines(plan: InjectPlan) -> Iterator[str]:
    rows = [{"layer": name, "shape": shape, "parameters": plan.parameters[name]} for name, shape in plan.layers.items()]
    yield output.table(rows)
    for name, info in plan.copied.items():
        yield f"trained whole: {name}, {info.numel:,} parameters"
    yield from output.by_reason("left out", plan.left_out)
    yield from output.notes(plan.notes)
    whole = sum(info.numel for info in plan.index.tensors.values())
    yield (
        f"{plan.spec.method.name} on {len(rows)} layers: {plan.trained:,} trained parameters,"
        f" {plan.trained / whole:.3%} of {whole:,}; {output.size(plan.stored_bytes)}"
    )
