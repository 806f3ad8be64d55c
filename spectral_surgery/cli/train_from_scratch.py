"""spectral-surgery train --init: a language model from nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.shared import F

if TYPE_CHECKING:
    from spectral_surgery.commands.train.from_scratch import ScratchReport

_FILE = click.Path(path_type=Path)


def _collect(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Gather the settings in ctx.obj, since they are too many for a signature."""
    ctx.ensure_object(dict)[parameter.name] = value


_option = partial(click.option, expose_value=False, callback=_collect, show_default=True)
_MODEL = (
    _option("--d-model", type=click.IntRange(1), default=128, help="Width."),
    _option("--num-layers", type=click.IntRange(1), default=4, help="Blocks."),
    _option("--heads", "num_heads", type=click.IntRange(1), default=16, help="Groups of channels that share a filter."),
    _option("--mlp-hidden-dim", type=click.IntRange(1), default=32, help="Width of the MLP that adapts the filters."),
    _option("--ff-hidden-dim", type=click.IntRange(1), help="Width of the MLP of a block  [default: 4 x --d-model]"),
    _option("--max-seq-length", type=click.IntRange(2), help="Prompt and answer at most  [default: --seq-length]"),
    _option("--kernel-length", type=click.IntRange(2), help="Tokens seen in a layer  [default: --seq-length]"),
    _option("--chunk", type=click.IntRange(1), default=32, help="Tokens after which the filters adapt to the text."),
    _option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1),
    _option("--layer-norm/--no-layer-norm", default=True),
    _option("--positions/--no-positions", "sinusoidal_positions", default=True, help="Add sinusoids to embeddings."),
    _option("--init-std", type=click.FloatRange(0), default=0.02, help="Spread of the filters at the start."),
)
_TRAINING = (
    _option("--learning-rate", "--lr", type=float, default=3e-3),
    _option("--weight-decay", type=float, default=0.01),
    _option("--epochs", type=float, default=3),
    _option("--steps", type=click.IntRange(0), default=0, show_default=False, help="In place of --epochs."),
    _option("--batch-size", type=click.IntRange(1), default=32, help="Over all processes."),
    _option("--gradient-accumulation", type=click.IntRange(1), default=1),
    _option("--warmup-ratio", type=click.FloatRange(0, 1), default=0.06),
    _option("--scheduler", default="cosine", help="linear, cosine, constant, ..."),
    _option(
        *("--eval-every", "--validate-every"),
        type=click.IntRange(0),
        default=0,
        show_default=False,
        help="Steps between looks at the validation part  [default: once per epoch]",
    ),
    _option("--patience", type=int, default=0, show_default=False, help="Stop after so many without improvement."),
    _option("--seed", default=0),
    _option("--bf16", is_flag=True, show_default=False, help="Compute in bfloat16."),
    _option("--gradient-checkpointing", is_flag=True, show_default=False, help="Less memory, more time."),
    _option("--device", help="cpu or cuda  [default: what is there]"),
)


def _all(options: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.command("train")
@shared.out_argument
@click.option("--init", "start", type=click.Choice(["fftnet", "transformer"]), required=True, help="What to build.")
@click.option("--control", is_flag=True, help="Also train the other one, of the same size, into OUT/control.")
@_option("--data", "file", type=_FILE, required=True, help="Text, .jsonl or .csv file to learn from.")
@_option("--columns", help="Of .csv and .jsonl files: the column of the text.")
@_option("--tokenizer", help="Folder or repository of one, or tiktoken:NAME  [default: learn a byte-level BPE]")
@_option("--vocab-size", "vocabulary", type=int, default=1024, help="Tokens of that BPE.")
@_option("--seq-length", type=click.IntRange(2), default=128, help="Tokens of an example.")
@_option("--validation-fraction", type=float, default=0.1, help="Part that decides which weights are kept.")
@_option("--test-fraction", type=float, default=0.1, help="Part on which the result is judged.")
@_all(_MODEL)
@_all(_TRAINING)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT.")
@click.option("--overwrite", is_flag=True, help="Discard what is in OUT.")
@shared.hub_options
@shared.push_option
@shared.output_options
@click.pass_obj
def command(
    options: dict[str, Any],
    out: Path,
    start: str,
    control: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a language model from nothing but a text, and write it to OUT as a folder of transformers.

    fftnet mixes tokens by causal spectral filters; transformer is a Llama with as many parameters as the FFTNet of the
    same options. The text is cut into three parts that follow each other: to train on, to choose the best weights by,
    and to judge them on. Beside the model: metrics.json, loss.png, checkpoints and TensorBoard logs.

    \b
    Example:
      spectral-surgery train --init fftnet --data tinyshakespeare.txt ./fftnet --control
      spectral-surgery generate ./fftnet "ROMEO:" --temperature 0.8 --top-k 40
    """
    from spectral_surgery.commands.train import from_scratch as workflow
    from spectral_surgery.training.pretrain import STARTS

    length = options["seq_length"]
    options |= {name: options[name] or length for name in ("max_seq_length", "kernel_length")}
    other = next(name for name in STARTS if name != start)
    access = shared.hub_access(quiet=quiet)
    if shared.shard_of(None)[0] == 0:
        access.prepare()
    with output.progress(quiet=quiet, unit=" steps") as progress:
        report = workflow.train_from_scratch(
            *(start, out, _data(options), _sizes(options), _settings(options)),
            control=other if control else None,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if report.is_main:
        _show(report, access.pushed(out), as_json=as_json)


def _of(kind: Any, options: dict[str, Any]) -> Any:
    """A dataclass, its fields by the options of their names."""
    return kind(**{field.name: options[field.name] for field in fields(kind) if field.name in options})


def _data(options: dict[str, Any]) -> Any:
    from spectral_surgery.commands.train.from_scratch import TIKTOKEN, ScratchData
    from spectral_surgery.hub import resolve

    tokenizer = options["tokenizer"]
    if tokenizer and not tokenizer.startswith(TIKTOKEN):
        tokenizer = str(resolve(tokenizer))
    columns = tuple(options["columns"].split(",")) if options["columns"] else ()
    return _of(ScratchData, options | {"columns": columns, "tokenizer": tokenizer})


def _sizes(options: dict[str, Any]) -> Any:
    from spectral_surgery.training.pretrain import ModelSizes

    return _of(ModelSizes, options)


def _settings(options: dict[str, Any]) -> Any:
    from spectral_surgery.training.trainer import TrainSettings

    return _of(TrainSettings, options | {"head_learning_rate": options["learning_rate"]})


def _show(report: ScratchReport, pushed: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        output.print_json("train", report.to_json() | pushed)
        return
    rows: list[dict[str, object]] = [
        {
            "model": model.start,
            "parameters": model.parameters,
            "validation loss": model.validation_loss,
            "test loss": model.test["loss"],
            "perplexity": model.test["perplexity"],
            "accuracy": model.test["accuracy"],
            "after 1 token": model.test["first_token_loss"],
            "seconds": model.history.seconds,
        }
        for model in report.models
    ]
    known = report.unigram
    frequencies = {"test loss": known["loss"], "perplexity": known["perplexity"], "accuracy": known["accuracy"]}
    rows.append({"model": "frequencies", "parameters": report.vocabulary, **frequencies})
    click.echo(output.table(rows))
    for model in report.models:
        click.echo(f"{model.start}: step {model.history.best_step} of {model.history.steps} kept: {model.folder}")
