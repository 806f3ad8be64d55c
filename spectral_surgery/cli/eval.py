"""spectral-surgery eval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command, from_options, optional_settings, options_of
from spectral_surgery.commands.settings import Reference
from spectral_surgery.errors import ConfigError
from spectral_surgery.run import Run
from spectral_surgery.text.settings import EvalData, TextData

if TYPE_CHECKING:
    from spectral_surgery.commands.eval import EvalReport

_SHOWN = 10  # tensors


@click.command("eval", cls=Command)
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]...", nargs=-1)
@click.option("--adapter", help="Put this adapter on B; without B, compare A without and with it.")
@options_of(EvalData, "text", "sts", flags={"text": "--text --data"})
@options_of(Reference, "baselines", flags={"baselines": "--baseline"})
@options_of(
    *(TextData, "file", "samples"),
    flags={"file": "--calibrate", "samples": "--calibrate-samples"},
    help={"file": "Text for baselines that need some: gptq, wanda, sparsegpt."},
    required=False,
)
@options_of(Reference, "bits")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw what each model lost over its bits per weight.",
)
@options_of(EvalData, "samples", "seq_length", "unreadable")
@click.option("--max-error", type=float, help="Exit with 3 when the relative error of the weights is larger.")
@click.option("--device", default="cpu", show_default=True, help="Models run on it.")
@click.option(
    "--engine",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="Judge several B here, or each in a task on a cluster of Ray, with --threads processors.",
)
@options_of(Run, "ray_address")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Processors of a task of Ray.")
@options_of(EvalData, "trust_remote_code")
@shared.reading_options
@shared.hub_options
@shared.output_options
def command(
    a: str, b: tuple[str, ...], adapter: str | None, plot: Path | None, max_error: float | None, device: str
) -> None:
    """Compare two checkpoints, plain or compressed: tensors by their relative error and, with text, as models.

    --text takes pairs, and folders of images or sound, as --calibrate of compress does: each is judged by what fits it,
    and by its labels and texts where there are any.

    With several B, or with baselines, a table of all of them: bits per weight, bytes, error, measures on the text, and
    of baselines the seconds and the memory that they took to make. --plot draws it. --revision is that of A. What
    cannot be judged is named, after the table of the others.

    \b
    Example:
      spectral-surgery eval ./model ./model-4bit
      spectral-surgery eval ./model ./model-4bit --text notes.txt
      spectral-surgery eval ./model ./model-4bit ./model-3bit --text notes.txt --baseline int8,nf4,int4,prune
      spectral-surgery eval ./model ./model-3bit --text test.txt --baseline gptq3,gptq4 --calibrate train.txt
      spectral-surgery eval ./model ./model-?bit --text test.txt --baseline all --calibrate train.txt --plot rate.png
      spectral-surgery eval ./encoder --adapter ./adapter --sts pairs.csv
      spectral-surgery eval ./vit ./vit-3bit --data photos
      spectral-surgery eval ./model ./model-?bit --text test.txt --engine ray --ray-address 10.0.0.1:6379
    """
    from spectral_surgery.commands.eval import evaluate

    data = from_options(EvalData)
    calibration = optional_settings(TextData, {"trust_remote_code": data.trust_remote_code})
    access = shared.hub_access()
    more = tuple(access.others().resolve(source)[0] for source in b[1:])
    reference = from_options(Reference, {"others": more, "calibration": calibration})
    run = data.has_text or reference.has_models  # whole models; else tensors, of which ranges are read
    first, second = ((of.resolve if run else of.locate) for of in (access, access.others()))
    if plot is not None:
        _check_plot(plot, table=reference.has_models)
    params = click.get_current_context().params
    where = {"ray_address": shared.ray_address(), "engine": params["engine"], "threads": params["threads"]}
    with shared.apart_from_ray(params["engine"]), output.progress() as progress:
        report = evaluate(
            first(a)[0],
            second(b[0])[0] if b else None,
            data,
            reference=reference,
            adapter=access.others().resolve(adapter)[0] if adapter else None,
            device=device,
            run=from_options(Run, where | {"progress": progress, "note": output.note}),
        )
    output.show(report.to_json(), _lines(report, compared=bool(b)))
    if plot is not None:
        from spectral_surgery.commands.eval.plot import plot_rate_distortion

        plot_rate_distortion(report.models, plot, report.models[0].model)
        click.echo(f"plot: {plot}", err=True)
    for name, reason in report.failed.items():
        click.echo(f"Error: {name}: {reason}", err=True)
    if report.failed:
        click.get_current_context().exit(1)
    if max_error is not None and report.relative_error > max_error:
        click.echo(f"Check failed: relative error {report.relative_error:.4f} is above {max_error:g}", err=True)
        click.get_current_context().exit(shared.CHECK_FAILED)


def _check_plot(plot: Path, *, table: bool) -> None:
    """Before the long part: there is something to draw, something to draw with, and a place for it."""
    from spectral_surgery.plotting import require_matplotlib

    if not table:
        raise ConfigError("eval --plot: expected several B or --baseline, whose table is drawn, got one model or two.")
    if not plot.parent.is_dir():
        raise ConfigError(f"eval --plot: expected a file in an existing folder, got {plot}. Create {plot.parent}.")
    require_matplotlib()


def _lines(report: EvalReport, *, compared: bool) -> Iterator[str]:
    if report.models:
        rows = [row.to_json() for row in report.models]
        columns = dict.fromkeys(name for row in rows for name in row)  # the first is compared with none
        yield output.table(rows, list(columns))
        return
    if report.tensors:
        yield output.table([vars(tensor) for tensor in report.tensors[:_SHOWN]])
        more = f", the {_SHOWN} worst above" if len(report.tensors) > _SHOWN else ""
        yield f"{len(report.tensors)} tensors differ{more}; relative error {report.relative_error:.4f} together"
    if compared:
        yield f"{report.equal} tensors are equal; {len(report.only_in_one)} are in one checkpoint only"
    if report.measures:
        yield output.table([{"measure": key, "value": value} for key, value in report.measures.items()])
