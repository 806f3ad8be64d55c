"""spectral-surgery compress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from spectral_surgery.cli import output, several, shared
from spectral_surgery.cli.options import Command, from_options, only_one, optional_settings, options_of
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.settings import Healing
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.memory import LITTLE, WORTH_KEEPING, keep_freed_memory
from spectral_surgery.pool import team
from spectral_surgery.run import EngineName, Run
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings

if TYPE_CHECKING:
    from spectral_surgery.commands.compress import CompressReport
    from spectral_surgery.files.compressed.plan import Plan
    from spectral_surgery.files.index import CheckpointIndex

Kind = Literal["density", "bits", "max_error"]

_SHOWN = 12  # tensors listed in text; --json lists all


@click.command("compress", cls=Command)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@shared.out_argument
@click.option("--sparsity", "--density", "density", type=float, help="Fraction of coefficients KEPT: 0.2 keeps 20 %.")
@click.option("--bits", type=float, help="Stored bits per weight, 0.5 to 8, every byte counted.")
@click.option("--max-error", type=float, help="Relative error of every tensor, at the fewest bits.")
@click.option("--lossless", is_flag=True, help="Code every tensor bit for bit: bfloat16 in two thirds of its bytes.")
@options_of(CompressOptions, "transform", "tile", "quantizer")
@click.option("--base", metavar="BASE", help="Compress the difference to this checkpoint; decompress needs it again.")
@options_of(CompressOptions, "include", "exclude", "min_weights", "copy_nonfinite", "copy")
@options_of(
    *(TextData, "file", "samples"),
    flags={"file": "--calibrate"},
    help={
        "file": "Choose codes so that outputs on this data stay right: text, or a folder of images or sound."
        " Needs the tokenizer or processor, and memory for a block."
    },
    required=False,
)
@click.option(
    "--seq-length",
    type=click.IntRange(2),
    help="Tokens of a sequence of --calibrate and --heal.  [default: 256; of --heal as the command heal]",
)
@options_of(TextData, "unreadable")
@options_of(CompressOptions, "allocation")
@click.option(
    "--heal",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Then train the kept coefficients on this data until the model does what SOURCE does; see heal.",
)
@options_of(Healing, "keep")
@options_of(
    *(DistillSettings, "steps", "minutes"),
    help={"steps": "Optimizer steps of --heal.", "minutes": "Time budget for --heal, instead of --steps."},
)
@click.option("--device", default="cpu", show_default=True, help="Of --calibrate and --heal: cpu or cuda.")
@options_of(Run, "workers")
@shared.threads_option
@options_of(Run, "engine", "ray_address", "parts")
@click.option("--shard", metavar="I/N", help="Do one of N shares; the last to finish joins them. torchrun sets it too.")
@options_of(Run, "resume")
@shared.reading_options
@shared.stream_push_option
@options_of(TextData, "trust_remote_code")
@shared.writing_options
def command(
    sources: tuple[str, ...], out: Path, base: str | None, device: str, workers: int, shard: str | None, dry_run: bool
) -> None:
    """Turn a checkpoint into entropy-coded spectra, from files, one part at a time.

    Exactly one of --sparsity, --bits, --max-error and --lossless says how small or how exact. OUT appears at the end,
    whole; a run that was cut off goes on with --resume. The bytes do not depend on workers, threads or interruptions.
    Several SOURCEs go with --base: OUT gets a folder for each.

    \b
    Example:
      spectral-surgery compress ./model ./model-4bit --bits 4 --workers 2 --dry-run
      spectral-surgery compress ./model ./model-3bit --bits 3 --calibrate notes.txt
      spectral-surgery compress ./model ./model-lossless --lossless
      spectral-surgery compress ./tuned ./tuned-difference --base ./model --max-error 0.2
      spectral-surgery compress ./chat ./code ./differences --base ./model --bits 1
      spectral-surgery compress org/large ./large-4bit --bits 4 --engine ray --ray-address 10.0.0.1:6379
    """
    target, ctx, source = _target(), click.get_current_context(), sources[0]
    if len(sources) > 1:
        several.compress_all(sources, out, target, workers)
        return
    engine, address, part = _engine(shard, workers)
    processes = ctx.with_resource(team(1 if dry_run else workers))  # before torch is imported here: they import it too
    from spectral_surgery.commands.compress import compress, compress_and_push, compress_shard, plan_compression

    access = shared.hub_access()
    before, name = access.others().locate(base) if base else (None, None)
    options = from_options(CompressOptions, {"target": target, "base": name})
    if dry_run:
        found = access.locate(source, headers=True)[0]
        index, plan = plan_compression(found, options, compare=isinstance(found, Path), base=before)
        output.show({"dry_run": True, **plan.to_json(index)}, _plan_lines(index, plan))
        return
    calibrate, heal = _texts(part)
    access.prepare()
    found, origin = access.resolve(source) if calibrate or heal else access.locate(source)
    threads = ctx.params["threads"] or 1 if engine == "ray" else shared.threads_or_all(workers=workers)
    who, pushed = {"workers": processes, "engine": engine, "ray_address": address}, dict[str, object]()
    with shared.apart_from_ray(engine), output.progress(" weights") as progress:
        more = {"threads": threads, "origin": origin, "progress": progress, "note": output.note}
        run = from_options(Run, who | more)
        if access.push and access.stream_push:
            push = (access.push, access.stream_push)
            report, done = compress_and_push(found, out, options, *push, base=before, token=access.token, run=run)
            pushed = {"pushed": done.to_json()}
        elif part[1] == 1:
            report = compress(found, out, options, calibrate=calibrate, heal=heal, base=before, device=device, run=run)
        elif (finished := compress_shard(found, out, options, part, base=before, run=run)) is not None:
            report = finished
        else:
            text = f"Shard {part[0]}/{part[1]} is done; the last of the others to finish writes {out}."
            hint = f"{text} If one was lost, run the command again without --shard and with --resume."
            output.show({"finished": False, "shard": list(part), "message": text}, [hint])
            return
    for line in _text_lines(report):
        click.echo(line, err=True)
    pushed = pushed or access.pushed(out)
    output.show({"finished": True, **report.to_json(), **pushed}, _report_lines(report))


def _target() -> Target:
    kinds: tuple[Kind, ...] = ("density", "bits", "max_error")
    params = click.get_current_context().params
    targets = [Target(kind, params[kind]) for kind in kinds if params[kind] is not None]
    targets += [Target("lossless", 0.0)] if params["lossless"] else []
    if len(targets) != 1:
        raise click.UsageError(
            "compress: expected one of --sparsity, --bits, --max-error and --lossless, got {}. Give one.".format(
                len(targets) or "none"
            )
        )
    return targets[0]


def _engine(shard: str | None, workers: int) -> tuple[EngineName, str | None, tuple[int, int]]:
    """Who encodes the parts, at which address, and which share of them is ours."""
    params = click.get_current_context().params
    engine, address = params["engine"], shared.ray_address()
    part = shared.shard_of(shard) if engine in (None, "torchrun") or shard else (0, 1)
    if shard and engine not in (None, "torchrun"):
        raise click.UsageError(f"--shard: expected --engine torchrun with it, got {engine}. Leave one of them out.")
    if params["parts"] and engine != "ray":
        raise click.UsageError("--parts: expected with --engine ray, got it alone.")
    if engine == "ray" and workers > 1:
        raise click.UsageError(
            "--workers: expected none with --engine ray, which uses all processors of the cluster. Leave it out."
        )
    return engine or ("torchrun" if part[1] > 1 else "local"), address, part


def _texts(part: tuple[int, int]) -> tuple[TextData | None, Healing | None]:
    """The text to calibrate and to heal on.

    Raises click.UsageError when --keep has nothing to choose from, or text meets --shard or --base.
    """
    params = click.get_current_context().params
    length: dict[str, object] = {"seq_length": params["seq_length"]} if params["seq_length"] else {}
    calibrate = optional_settings(TextData, length)
    text = from_options(TextData, length | {"file": params["heal"], "samples": 0}) if params["heal"] else None
    if params["keep"] is not None and (text is None or calibrate is not None):
        raise click.UsageError(
            "--keep: expected --heal, and no --calibrate, which chooses itself. Leave one of them out."
        )
    if (part[1] > 1 or params["base"]) and (calibrate or text):
        raise click.UsageError(
            "--calibrate and --heal: expected a whole model, got --shard or --base. Run heal under torchrun."
        )
    if params["stream_push"] and (part[1] > 1 or calibrate or text):
        raise click.UsageError(
            "--stream-push: expected no --calibrate, --heal or --shard, which need all of OUT. Leave it out."
        )
    keep_freed_memory(LITTLE if calibrate and not text else WORTH_KEEPING)  # healing has the whole model in memory
    only_one("steps", "minutes")
    if text is None:
        return calibrate, None
    return calibrate, from_options(Healing, {"data": text, "settings": from_options(DistillSettings)})


def _text_lines(report: CompressReport) -> Iterator[str]:
    """What calibrating and healing did."""
    reached, healed = report.calibration, report.healing
    if reached is not None:
        yield (
            f"{reached.matrices[0]} weights calibrated, of {reached.matrices[1]}: {reached.weights[0]:,} of"
            f" {reached.weights[1]:,} numbers; largest error of outputs {reached.largest.output_error:.4f},"
            f" {reached.largest.name}"
        )
        yield from output.by_reason("not calibrated", reached.left)
        if reached.whole:
            yield "the model has no one list of blocks: all layers were given what the original gives them"
    if healed is not None:
        curve = healed.curve
        yield (
            f"{healed.trained[1]:,} coefficients trained, step {curve.best_step} of {curve.step} kept: held-out loss"
            f" {curve.held_out[0][1]:.4f} -> {curve.best:.4f}"
        )


def _plan_lines(index: CheckpointIndex, plan: Plan) -> Iterator[str]:
    from spectral_surgery.files.remote_code import notes_on

    yield output.table([{"tensor": t.info.name, "shape": t.info.shape, "parts": len(t.parts)} for t in plan.tensors])
    yield (
        f"\n{len(plan.tensors)} tensors, {plan.weights:,} weights at about {plan.predicted_bits():.2f} bits per weight:"
        f" {output.size(index.nbytes)} -> about {output.size(plan.predicted_bytes(index))}; "
        f"memory of a worker about {output.size(plan.predicted_memory())} besides torch."
    )
    yield from output.by_reason("copied", plan.copied)
    yield from (f"tied: {alias} = {name}, stored once" for alias, name in plan.aliases.items())
    yield from output.notes([*index.notes, *notes_on(index.config)])
    yield "Nothing was written."


def _report_lines(report: CompressReport) -> Iterator[str]:
    records = sorted(report.manifest.tensors.items(), key=lambda item: -item[1].report.weights)
    rows = [
        {
            "tensor": name,
            "shape": record.shape,
            "bits_per_weight": record.report.bits_per_weight,
            "relative_error": record.report.relative_error,
            "density": record.report.density,
        }
        for name, record in records
    ]
    coded = report.manifest.lossless
    if not rows:
        yield (
            f"{len(coded)} tensors coded without loss, {len(report.copied) - len(coded)} copied as they are.\n"
            f"{output.size(report.input_bytes)} -> {output.size(report.output_bytes)},"
            f" {report.output_bytes / report.input_bytes:.3f} of it, in {report.seconds:.1f} s with"
            f" {output.size(report.peak_rss_bytes)} of memory at most."
        )
        yield from output.notes(report.notes)
        return
    yield output.table(rows[:_SHOWN])
    if len(rows) > _SHOWN:
        yield f"... and {len(rows) - _SHOWN} smaller ones (--json lists all)"
    total = report.manifest.report
    yield (
        f"\n{len(rows)} tensors: {total.bits_per_weight:.3f} bits per weight, relative error"
        f" {total.relative_error:.4f}, density {total.density:.3f}; {len(report.copied)} tensors copied,"
        f" {len(coded)} of them coded without loss.\n"
        f"{output.size(report.input_bytes)} -> {output.size(report.output_bytes)}, {report.compression_ratio:.1f}x"
        f" smaller, in {report.seconds:.1f} s with {output.size(report.peak_rss_bytes)} of memory at most."
    )
    yield from output.notes(report.notes)
    if report.not_copied_files:
        yield f"left out, weights in other formats: {', '.join(report.not_copied_files[:5])}"
