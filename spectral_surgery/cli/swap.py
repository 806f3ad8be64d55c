"""spectral-surgery swap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared
from spectral_surgery.cli.options import Command, from_options, numbers, optional_settings, options_of
from spectral_surgery.commands.settings import FitSettings
from spectral_surgery.text.settings import EvalData, TextData

if TYPE_CHECKING:
    from spectral_surgery.commands.swap import SwapPlan, SwapReport


@click.command("swap", cls=Command)
@shared.source_argument
@shared.out_argument
@click.option(
    "--mixer", metavar="MIXER", required=True, help="What replaces attention; `spectral-surgery methods` lists them."
)
@click.option("--layers", type=numbers, required=True, help="In these layers of the model, such as 0,2 or 1-3.")
@adapter_options.setting_option
@options_of(
    *(TextData, "file"),
    flags={"file": "--distill"},
    help={"file": "Train the mixers on this text to do what attention did."},
    required=False,
)
@options_of(FitSettings, "steps", "end_to_end_steps", "learning_rate")
@options_of(
    *(EvalData, "text", "sts", "seq_length"),
    help={
        "text": "Perplexity of language models before and after, cosine of encoders, on it.",
        "sts": "CSV of sentence pairs and scores: rank correlation before and after.",
    },
)
@options_of(FitSettings, "seed")
@options_of(EvalData, "trust_remote_code")
@shared.writing_options
def command(source: str, out: Path, mixer: str, layers: tuple[int, ...], dry_run: bool, overwrite: bool) -> None:
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
    from spectral_surgery.live.swap import SwapSpec
    from spectral_surgery.mixers import MIXERS

    spec = SwapSpec(mixer, layers, adapter_options.typed_settings(MIXERS[mixer].config))
    access, training, judged_on = shared.hub_access(), from_options(FitSettings), from_options(EvalData)
    if dry_run:
        outline = access.locate(source, headers=True)[0]
        plan = workflow.plan_swap(outline, spec, trust_remote_code=judged_on.trust_remote_code)
        output.show(plan.to_json() | {"dry_run": True}, _plan_lines(plan))
        output.nothing_written()
        return
    with output.progress(" steps") as progress:
        report = workflow.swap(
            access.prepare().resolve(source)[0],
            out,
            spec,
            data=optional_settings(TextData, {"seq_length": judged_on.seq_length}),
            training=training,
            judged_on=judged_on,
            seed=training.seed,
            trust_remote_code=judged_on.trust_remote_code,
            overwrite=overwrite,
            progress=progress,
        )
    output.show(report.to_json() | access.pushed(out), _lines(report, out))


def _plan_lines(plan: SwapPlan) -> Iterator[str]:
    settings = ", ".join(f"{name} {value}" for name, value in plan.record.settings.items()) or "none"
    before, after = plan.parameters
    yield f"{plan.record.mixer} in layers {', '.join(map(str, plan.record.layers))}; settings: {settings}"
    yield f"{before:,} -> {after:,} parameters; causal: {'yes' if plan.causal else 'no'}"


def _lines(report: SwapReport, out: Path) -> Iterator[str]:
    yield from _plan_lines(report.plan)
    if report.fits:
        rows = [{"layer": fit.layer, "error before": fit.before, "error after": fit.after} for fit in report.fits]
        yield output.table(rows)
        yield "relative error of the outputs of each attention, on held-out text, before and after its training"
    if report.measures:
        yield output.table([{"measure": key, "value": value} for key, value in report.measures.items()])
        yield "_a: the original; _b: swapped"
    yield f"{report.seconds:.1f} s: {out}"
