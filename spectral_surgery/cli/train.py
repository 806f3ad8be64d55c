"""spectral-surgery train, and train --init: a language model from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import adapter_options, output, shared
from spectral_surgery.cli.options import Command, from_options, options_of
from spectral_surgery.text.settings import ScratchData, TrainData
from spectral_surgery.training.settings import FROM_SCRATCH, ModelSizes, TrainSettings

if TYPE_CHECKING:
    from spectral_surgery.commands.train import TrainReport
    from spectral_surgery.commands.train.from_scratch import ScratchReport

_TOO_LOW = 5  # below a fifth of the usual learning rate nothing much is learned
_SETTINGS = (
    *("learning_rate", "head_learning_rate", "epochs", "steps", "batch_size", "gradient_accumulation", "weight_decay"),
    *("warmup_ratio", "scheduler", "eval_every", "patience", "seed", "bf16", "gradient_checkpointing", "device"),
)


_SCRATCH_SETTINGS = tuple(name for name in _SETTINGS if name != "head_learning_rate")


@click.command("train", cls=Command)
@click.argument("base", metavar="BASE")
@shared.out_argument
@options_of(
    *(TrainData, "file", "eval_file", "eval_fraction", "columns", "task", "seq_length"),
    flags={"file": "--data", "eval_file": "--eval-data"},
)
@adapter_options.method_options
@adapter_options.target_options
@adapter_options.trained_options
@options_of(TrainSettings, *_SETTINGS)
@options_of(TrainData, "trust_remote_code")
@shared.hub_options
@shared.push_options
@shared.resume_training_options
@shared.output_options
def command(base: str, out: Path, bias: str, resume: bool, overwrite: bool) -> None:
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
    from spectral_surgery.commands import train as workflow

    access, data, training = shared.hub_access(), from_options(TrainData), from_options(TrainSettings)
    spec = adapter_options.spec_of(base, access.revision, bias)
    usual = spec.method.learning_rate
    if training.learning_rate is not None and training.learning_rate < usual / _TOO_LOW:
        rate = f"--learning-rate {training.learning_rate:g} is low for {spec.method.name}"
        click.echo(f"Warning: {rate}, which usually needs about {usual:g}.", err=True)
    if shared.is_first():
        access.prepare()
    path = access.resolve(base)[0]
    with output.progress(" steps") as progress:
        report = workflow.train(path, out, data, spec, training, resume=resume, overwrite=overwrite, progress=progress)
    if report.history.is_main:
        output.show(report.to_json() | access.pushed(out), _lines(report, out))


def _lines(report: TrainReport, out: Path) -> Iterator[str]:
    if report.new_weights:
        click.echo(f"new, random at the start: {', '.join(report.new_weights)}", err=True)
    names = sorted({*report.before, *report.after} - {"epoch"})
    yield output.table(
        [{"held out": n, "before": report.before.get(n, ""), "after": report.after.get(n, "")} for n in names]
    )
    yield (
        f"{report.trainable_parameters:,} of {report.all_parameters:,} parameters trained,"
        f" {output.size(report.adapter_bytes)}, step {report.history.best_step} of {report.history.steps} kept,"
        f" in {report.history.seconds:.0f} s: {out}"
    )


@click.command("train", cls=Command)
@shared.out_argument
@click.option("--init", "start", type=click.Choice(["fftnet", "transformer"]), required=True, help="What to build.")
@click.option("--control", is_flag=True, help="Also train the other one, of the same size, into OUT/control.")
@options_of(
    *(ScratchData, "file", "columns", "tokenizer", "vocabulary", "seq_length", "validation_fraction", "test_fraction"),
    flags={"file": "--data file", "vocabulary": "--vocab-size vocabulary"},
    help={"tokenizer": "Folder or repository of one, or tiktoken:NAME."},
)
@options_of(
    ModelSizes,
    flags={"num_heads": "--heads num_heads", "sinusoidal_positions": "--positions/--no-positions sinusoidal_positions"},
)
@options_of(FROM_SCRATCH, *_SCRATCH_SETTINGS, flags={"eval_every": "--eval-every --validate-every"})
@shared.resume_training_options
@shared.hub_options
@shared.push_options
@shared.output_options
def from_scratch(out: Path, start: str, control: bool, resume: bool, overwrite: bool) -> None:
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

    data, access = from_options(ScratchData), shared.hub_access()
    if data.tokenizer and not data.tokenizer.startswith(workflow.TIKTOKEN):
        data = replace(data, tokenizer=str(access.others().resolve(data.tokenizer)[0]))
    other = next(name for name in STARTS if name != start)
    if shared.is_first():
        access.prepare()
    with output.progress(" steps") as progress:
        report = workflow.train_from_scratch(
            *(start, out, data, from_options(ModelSizes), from_options(TrainSettings)),
            control=other if control else None,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    if report.is_main:
        output.show(report.to_json() | access.pushed(out), _scratch_lines(report))


def _scratch_lines(report: ScratchReport) -> Iterator[str]:
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
    yield output.table(rows)
    for model in report.models:
        yield f"{model.start}: step {model.history.best_step} of {model.history.steps} kept: {model.folder}"
