"""spectral-surgery train."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectral_surgery.cli import adapter_options, output, shared

if TYPE_CHECKING:
    from spectral_surgery.commands.train import TrainReport

_FILE = click.Path(path_type=Path)
_TOO_LOW = 5  # below a fifth of the usual learning rate nothing much is learned


def _collect(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Gather the settings of the training in ctx.obj, since they are too many for a signature."""
    ctx.ensure_object(dict)[parameter.name] = value


_setting = partial(click.option, expose_value=False, callback=_collect)


@click.command("train")
@click.argument("base", metavar="BASE")
@shared.out_argument
@_setting("--data", type=_FILE, required=True, help="Text, .jsonl or .csv file to train on.")
@_setting("--eval-data", type=_FILE, help="Held-out examples  [default: a part of --data]")
@_setting("--eval-fraction", default=0.1, show_default=True, help="That part.")
@_setting("--columns", help="Columns to use, texts first, the label last: sentence1,sentence2,score")
@_setting(
    "--task",
    type=click.Choice(["causal-lm", "classification", "regression", "similarity"]),
    help="What to train for  [default: told from the data]",
)
@_setting("--seq-length", type=click.IntRange(2), default=256, show_default=True, help="Tokens of an example.")
@adapter_options.method_options
@adapter_options.target_options
@adapter_options.trained_options
@_setting("--learning-rate", "--lr", type=float, help="Of the adapter  [default: what the method usually needs]")
@_setting("--head-learning-rate", type=float, default=1e-3, show_default=True, help="Of heads and biases.")
@_setting("--epochs", type=float, default=3, show_default=True)
@_setting("--steps", type=int, default=0, help="Optimizer steps, in place of --epochs.")
@_setting("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Over all processes.")
@_setting("--gradient-accumulation", type=click.IntRange(1), default=1, show_default=True)
@_setting("--weight-decay", type=float, default=0.0, show_default=True)
@_setting("--warmup-ratio", type=click.FloatRange(0, 1), default=0.06, show_default=True)
@_setting("--scheduler", default="linear", show_default=True, help="linear, cosine, constant, ...")
@_setting("--eval-every", type=int, default=0, help="Steps between evaluations  [default: once per epoch]")
@_setting("--patience", type=int, default=0, help="Stop after so many evaluations without improvement.")
@_setting("--seed", default=0, show_default=True)
@_setting("--bf16", is_flag=True, help="Compute in bfloat16.")
@_setting("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@_setting("--device", help="cpu or cuda  [default: what is there]")
@shared.trust_option
@shared.hub_options
@shared.push_option
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT.")
@click.option("--overwrite", is_flag=True, help="Discard what is in OUT.")
@shared.output_options
@click.pass_obj
def command(
    options: dict[str, Any],
    base: str,
    out: Path,
    method: str,
    settings: tuple[str, ...],
    target_modules: str | None,
    exclude_modules: str | None,
    layers: str | None,
    modules_to_save: str | None,
    bias: str,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train an adapter for the model BASE on a file of text, and write it to OUT in PEFT's format.

    Beside the adapter: metrics.json, loss.png, checkpoints and TensorBoard logs. The adapter kept is the one that did
    best on held-out examples. Runs under torchrun and accelerate launch. --push leaves the checkpoints here.

    Without BASE, --init fftnet and --init transformer train a whole language model from nothing; their options are in
    `spectral-surgery train --init fftnet --help`.

    \b
    Example:
      spectral-surgery train ./model ./adapter --data notes.txt --method fourierft
      spectral-surgery train ./encoder ./adapter --data pairs.csv --task similarity --method lora -o r=8
      spectral-surgery train org/model ./adapter --data notes.txt --method lora --push org/adapter --private
    """
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.adapters.base import AdapterSpec
    from spectral_surgery.commands import train as workflow

    row = METHODS[method]
    targets = adapter_options.targets_of(target_modules, exclude_modules, layers, modules_to_save, bias)
    if bias == "only":
        targets = replace(targets, bias=f"{row.name}_only")
    config = adapter_options.config_of(row.name, settings)
    how = _settings(options, row.learning_rate)
    if how.learning_rate < row.learning_rate / _TOO_LOW:
        click.echo(
            f"Warning: --learning-rate {how.learning_rate:g} is low for {row.name}, which usually needs about"
            f" {row.learning_rate:g}.",
            err=True,
        )
    access, is_main = shared.hub_access(quiet=quiet), shared.shard_of(None)[0] == 0
    name, revision = adapter_options.base_name(base)
    spec = AdapterSpec(row, config, targets, name, access.revision or revision)
    if is_main:
        access.prepare()
    path = access.resolve(base)[0]
    with output.progress(quiet=quiet, unit=" steps") as progress:
        report = workflow.train(
            path, out, _data(options), spec, how, resume=resume, overwrite=overwrite, progress=progress
        )
    if report.history.is_main:
        _show(report, out, as_json=as_json, more=access.pushed(out))


def _data(options: dict[str, Any]) -> Any:
    from spectral_surgery.commands.train import TrainData

    columns = tuple(options["columns"].split(",")) if options["columns"] else ()
    return TrainData(
        options["data"],
        options["eval_data"],
        options["eval_fraction"],
        columns,
        options["task"],
        options["seq_length"],
        shared.trusted(),
    )


def _settings(options: dict[str, Any], usual: float) -> Any:
    from dataclasses import fields

    from spectral_surgery.training.trainer import TrainSettings

    given = {field.name: options[field.name] for field in fields(TrainSettings) if field.name in options}
    return TrainSettings(**given | {"learning_rate": options["learning_rate"] or usual})


def _show(report: TrainReport, out: Path, *, as_json: bool, more: dict[str, object]) -> None:
    if as_json:
        output.print_json("train", report.to_json() | more)
        return
    if report.new_weights:
        click.echo(f"new, random at the start: {', '.join(report.new_weights)}", err=True)
    names = sorted({*report.before, *report.after} - {"epoch"})
    rows = [
        {"held out": name, "before": report.before.get(name, ""), "after": report.after.get(name, "")} for name in names
    ]
    click.echo(output.table(rows))
    click.echo(
        f"{report.trainable_parameters:,} of {report.all_parameters:,} parameters trained,"
        f" {output.size(report.adapter_bytes)}, step {report.history.best_step} of {report.history.steps} kept,"
        f" in {report.history.seconds:.0f} s: {out}"
    )
