"""spectral-surgery swap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared

if TYPE_CHECKING:
    from spectral_surgery.commands.swap import SwapPlan, SwapReport

_FILE = click.Path(path_type=Path)


@click.command("swap")
@shared.source_argument
@shared.out_argument
@click.option(
    "--mixer", metavar="MIXER", required=True, help="What replaces attention; `spectral-surgery methods` lists them."
)
@click.option("--layers", metavar="NUMBERS", required=True, help="In these layers of the model, such as 0,2 or 1-3.")
@adapter_options.setting_option
@click.option("--distill", type=_FILE, metavar="FILE", help="Train the mixers on this text to do what attention did.")
@click.option("--steps", type=click.IntRange(0), default=500, show_default=True, help="Of --distill, each layer alone.")
@click.option(
    "--end-to-end-steps", type=click.IntRange(0), default=0, show_default=True, help="Then of all of them together."
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True)
@click.option("--text", type=_FILE, help="Perplexity of language models before and after, cosine of encoders, on it.")
@click.option("--sts", type=_FILE, help="CSV of sentence pairs and scores: rank correlation before and after.")
@click.option("--seq-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--seed", default=0, show_default=True, help="Of random starts and of the order of the text.")
@shared.trust_option
@shared.hub_options
@shared.push_option
@shared.writing_options
@shared.output_options
def command(
    source: str,
    out: Path,
    mixer: str,
    layers: str,
    settings: tuple[str, ...],
    distill: Path | None,
    steps: int,
    end_to_end_steps: int,
    learning_rate: float,
    text: Path | None,
    sts: Path | None,
    seq_length: int,
    seed: int,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Replace the attention of some layers of SOURCE by a token mixer, and say what that costs.

    For BERT, RoBERTa, ViT, GPT-2, Llama and Qwen. A new layer starts from the value and output projections of the
    attention; --distill trains it to give the outputs of the attention it replaces. The result is loaded by
    from_pretrained after `import spectral_surgery`. Models that predict the next token take causal mixers only.

    \b
    Example:
      spectral-surgery swap ./encoder ./out --mixer fftnet --layers 2 --distill train.csv --sts dev.csv
      spectral-surgery swap ./llama ./out --mixer causal_fftnet --layers 0,2 --distill train.txt --text held-out.txt
    """
    from spectral_surgery.commands import swap as workflow
    from spectral_surgery.commands.eval import EvalData
    from spectral_surgery.commands.swap.fit_layers import FitSettings
    from spectral_surgery.live.swap import SwapSpec
    from spectral_surgery.mixers import MIXERS
    from spectral_surgery.options import parse_settings
    from spectral_surgery.text.data import TextData

    parsed = parse_settings(MIXERS[mixer].config, settings)
    chosen = {name: getattr(parsed, name) for name in {pair.partition("=")[0] for pair in settings}}
    spec = SwapSpec(mixer, adapter_options.numbers_of(layers), chosen)
    access, trust = shared.hub_access(quiet=quiet), shared.trusted()
    if dry_run:
        with access.outline(source) as found:
            _show_plan(workflow.plan_swap(found.path, spec, trust_remote_code=trust), as_json=as_json, dry_run=True)
        return
    with output.progress(quiet=quiet, unit=" steps") as progress:
        report = workflow.swap(
            access.prepare().resolve(source)[0],
            out,
            spec,
            data=TextData(distill, seq_length=seq_length) if distill else None,
            training=FitSettings(steps, end_to_end_steps, learning_rate, seed=seed),
            judged_on=EvalData(text, sts, seq_length=seq_length),
            seed=seed,
            trust_remote_code=trust,
            overwrite=overwrite,
            progress=progress,
        )
    _show(report, out, as_json=as_json, more=access.pushed(out))


def _show_plan(plan: SwapPlan, *, as_json: bool, dry_run: bool = False) -> None:
    if as_json:
        output.print_json("swap", plan.to_json() | {"dry_run": True})
        click.echo("Nothing was written.", err=True)
        return
    settings = ", ".join(f"{name} {value}" for name, value in plan.record.settings.items()) or "none"
    before, after = plan.parameters
    click.echo(f"{plan.record.mixer} in layers {', '.join(map(str, plan.record.layers))}; settings: {settings}")
    click.echo(f"{before:,} -> {after:,} parameters; causal: {'yes' if plan.causal else 'no'}")
    if dry_run:
        click.echo("Nothing was written.")


def _show(report: SwapReport, out: Path, *, as_json: bool, more: dict[str, object]) -> None:
    if as_json:
        output.print_json("swap", report.to_json() | more)
        return
    _show_plan(report.plan, as_json=False)
    if report.fits:
        rows = [{"layer": fit.layer, "error before": fit.before, "error after": fit.after} for fit in report.fits]
        click.echo(output.table(rows))
        click.echo("relative error of the outputs of each attention, on held-out text, before and after its training")
    if report.measures:
        click.echo(output.table([{"measure": key, "value": value} for key, value in report.measures.items()]))
        click.echo("_a: the original; _b: swapped")
    click.echo(f"{report.seconds:.1f} s: {out}")
