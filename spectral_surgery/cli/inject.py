"""spectral-surgery inject."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared

if TYPE_CHECKING:
    from spectral_surgery.commands.inject import InjectPlan


@click.command("inject")
@shared.source_argument
@shared.out_argument
@adapter_options.method_options
@adapter_options.target_options
@adapter_options.trained_options
@click.option("--seed", default=0, show_default=True, help="Of the random starts.")
@shared.hub_options
@shared.push_option
@shared.writing_options
@shared.output_options
def command(
    source: str,
    out: Path,
    method: str,
    settings: tuple[str, ...],
    target_modules: str | None,
    exclude_modules: str | None,
    layers: str | None,
    modules_to_save: str | None,
    bias: str,
    seed: int,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
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
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.adapters.base import AdapterSpec
    from spectral_surgery.commands import inject as workflow

    row = METHODS[method]
    targets = adapter_options.targets_of(target_modules, exclude_modules, layers, modules_to_save, bias)
    if bias == "only":
        targets = replace(targets, bias=f"{row.name}_only")
    config = adapter_options.config_of(row.name, settings)
    access = shared.hub_access(quiet=quiet)
    name, revision = adapter_options.base_name(source)
    spec = AdapterSpec(row, config, targets, name, access.revision or revision)
    if dry_run:
        with access.outline(source) as found:
            plan = workflow.plan_injection(found.path, spec)
        _show(plan, as_json=as_json, more={"dry_run": True})
        click.echo("Nothing was written.", err=as_json)
        return
    access.prepare()
    with output.progress(quiet=quiet, unit=" layers") as progress:
        plan = workflow.inject(access.resolve(source)[0], out, spec, seed=seed, overwrite=overwrite, progress=progress)
    _show(plan, as_json=as_json, more=access.pushed(out))


def _show(plan: InjectPlan, *, as_json: bool, more: dict[str, object]) -> None:
    if as_json:
        output.print_json("inject", plan.to_json() | more)
        return
    rows = [{"layer": name, "shape": shape, "parameters": plan.parameters[name]} for name, shape in plan.layers.items()]
    click.echo(output.table(rows))
    for name, info in plan.copied.items():
        click.echo(f"trained whole: {name}, {info.numel:,} parameters")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        click.echo(f"left out, {reason}: {len(names)} ({some})")
    output.notes(plan.notes)
    whole = sum(info.numel for info in plan.index.tensors.values())
    click.echo(
        f"{plan.spec.method.name} on {len(rows)} layers: {plan.trained:,} trained parameters,"
        f" {plan.trained / whole:.3%} of {whole:,}; {output.size(plan.stored_bytes)}"
    )
