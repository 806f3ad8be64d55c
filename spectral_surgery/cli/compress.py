"""spectral-surgery compress."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from spectral_surgery.cli import calibration, output, shared
from spectral_surgery.pool import team

if TYPE_CHECKING:
    from spectral_surgery.commands.compress import CompressReport
    from spectral_surgery.files.compressed.plan import CompressOptions, Plan
    from spectral_surgery.hub import Found

Kind = Literal["density", "bits", "max_error"]

_SHOWN = 12  # tensors listed in text; --json lists all


@click.command("compress")
@shared.source_argument
@shared.out_argument
@click.option("--sparsity", "--density", "density", type=float, help="Fraction of coefficients KEPT: 0.2 keeps 20 %.")
@click.option("--bits", type=float, help="Stored bits per weight, 0.5 to 8, every byte counted.")
@click.option("--max-error", type=float, help="Relative error of every tensor, at the fewest bits.")
@click.option(
    "--transform", default="dct", show_default=True, help="A transform (see methods), or auto: the best of each part."
)
@click.option("--tile", type=int, default=64, show_default=True, help="Side of the transform tiles.")
@shared.base_option("Compress the difference to this checkpoint, which decompress needs again.")
@click.option("--include", multiple=True, metavar="GLOB", help="Compress only tensors that match; repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Copy tensors that match; repeatable.")
@click.option("--min-weights", type=int, default=4096, show_default=True, help="Copy smaller tensors.")
@click.option(
    "--copy-nonfinite", is_flag=True, help="Copy tensors with NaN or infinite values instead of refusing them."
)
@calibration.calibration_options
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@shared.threads_option
@click.option("--shard", metavar="I/N", help="Do one of N shares; the last to finish joins them. torchrun sets it too.")
@click.option("--resume", is_flag=True, help="Go on with unfinished work of the same source and options.")
@shared.trust_option
@shared.hub_options
@shared.push_option
@shared.writing_options
@shared.output_options
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    out: Path,
    density: float | None,
    bits: float | None,
    max_error: float | None,
    transform: str,
    tile: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    min_weights: int,
    copy_nonfinite: bool,
    workers: int,
    threads: int | None,
    shard: str | None,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn a checkpoint into entropy-coded spectra, from files, one part at a time.

    Exactly one of --sparsity, --bits and --max-error says how small or how exact. OUT appears at the end, whole; a run
    that was cut off goes on with --resume. The bytes do not depend on workers, threads or interruptions.

    \b
    Example:
      spectral-surgery compress ./model ./model-4bit --bits 4 --workers 2 --dry-run
      spectral-surgery compress ./model ./model-3bit --bits 3 --calibrate notes.txt
      spectral-surgery compress ./tuned ./tuned-difference --base ./model --max-error 0.2
    """
    chosen, part = _only(ctx, {"density": density, "bits": bits, "max_error": max_error}), shared.shard_of(shard)
    own = ctx.with_resource(team(1 if dry_run else workers))  # before torch is imported here: they import it too
    from spectral_surgery.commands.compress import compress, compress_shard
    from spectral_surgery.run import Run

    access = shared.hub_access(quiet=quiet)
    before, name = access.base()
    options = _options(
        chosen, transform, tile, (include, exclude), min_weights, copy_nonfinite=copy_nonfinite, base=name
    )
    if dry_run:
        _show_plan(access.outline(source), options, before, as_json=as_json)
        return
    path, origin = access.prepare().resolve(source)
    options, calibrate, heal = calibration.texts(ctx, options, part)
    with output.progress(quiet=quiet, unit=" weights") as progress:
        run = Run(own, shared.threads_or_all(threads, workers), resume, overwrite, origin, progress)
        report = (
            compress(path, out, options, calibrate=calibrate, heal=heal, base=before, run=run)
            if part[1] == 1
            else compress_shard(path, out, options, part, base=before, run=run)
        )
    calibration.show_text(report)
    _show_report(report, out, part, access.pushed(out) if report else {}, as_json=as_json)


def _only(ctx: click.Context, asked: dict[Kind, float | None]) -> tuple[Kind, float]:
    given = [(kind, value) for kind, value in asked.items() if value is not None]
    if len(given) != 1:
        raise click.UsageError("exactly one of --sparsity, --bits and --max-error is needed.", ctx)
    return given[0]


def _options(
    target: tuple[Kind, float],
    transform: str,
    tile: int,
    globs: tuple[tuple[str, ...], tuple[str, ...]],
    min_weights: int,
    *,
    copy_nonfinite: bool,
    base: str | None,
) -> CompressOptions:
    from spectral_surgery.codec.rate import Target
    from spectral_surgery.files.compressed.plan import CompressOptions

    return CompressOptions(Target(*target), transform, tile, *globs, min_weights, copy_nonfinite, base=base)


def _show_plan(
    outline: AbstractContextManager[Found], options: CompressOptions, base: Path | None, *, as_json: bool
) -> None:
    from spectral_surgery.commands.compress import plan_compression
    from spectral_surgery.files.remote_code import notes_on

    with outline as found:
        index, plan = plan_compression(found.path, options, compare=found.whole, base=base)
    bits = plan.predicted_bits()
    copied = sum(index.tensors[name].nbytes for name in plan.copied)
    body = {
        "dry_run": True,
        "tensors": [{"name": t.info.name, "shape": list(t.info.shape), "parts": len(t.parts)} for t in plan.tensors],
        "skipped": [{"name": name, "reason": reason} for name, reason in plan.copied.items()],
        "tied": plan.aliases,
        "weights": plan.weights,
        "predicted_bits_per_weight": bits,
        "predicted_bytes": round(plan.weights * bits / 8) + copied,
        "predicted_worker_bytes": plan.predicted_memory(),
        "input_bytes": index.nbytes,
        "files_left_out": [str(name) for name in index.skipped_files],
        "notes": [*index.notes, *notes_on(index.config)],
    }
    if as_json:
        output.print_json("compress", body)
        return
    click.echo(
        output.table([{"tensor": t.info.name, "shape": t.info.shape, "parts": len(t.parts)} for t in plan.tensors])
    )
    click.echo(
        f"\n{len(plan.tensors)} tensors, {plan.weights:,} weights at about {bits:.2f} bits per weight: "
        f"{output.size(index.nbytes)} -> about {output.size(plan.weights * bits / 8 + copied)}; "
        f"memory of a worker about {output.size(plan.predicted_memory())} besides torch."
    )
    _show_copied(plan)
    output.notes((*index.notes, *notes_on(index.config)))
    click.echo("Nothing was written.")


def _show_copied(plan: Plan) -> None:
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.copied.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        click.echo(f"copied, {reason}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    for alias, name in plan.aliases.items():
        click.echo(f"tied: {alias} = {name}, stored once")


def _show_report(
    report: CompressReport | None, out: Path, part: tuple[int, int], pushed: dict[str, object], *, as_json: bool
) -> None:
    if report is None:
        text = f"Shard {part[0]}/{part[1]} is done; the last of the others to finish writes {out}."
        if as_json:
            output.print_json("compress", {"finished": False, "shard": list(part), "message": text})
        else:
            click.echo(f"{text} If one was lost, run the command again without --shard and with --resume.")
        return
    body = report.to_json() | pushed
    if as_json:
        output.print_json("compress", {"finished": True, **body})
        return
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
    click.echo(output.table(rows[:_SHOWN]))
    if len(rows) > _SHOWN:
        click.echo(f"... and {len(rows) - _SHOWN} smaller ones (--json lists all)")
    total = report.manifest.report
    click.echo(
        f"\n{len(rows)} tensors: {total.bits_per_weight:.3f} bits per weight, relative error "
        f"{total.relative_error:.4f}, "
        f"density {total.density:.3f}; {len(report.copied)} tensors copied.\n"
        f"{output.size(report.input_bytes)} -> {output.size(report.output_bytes)}, {report.compression_ratio:.1f}x "
        "smaller, "
        f"in {report.seconds:.1f} s with {output.size(report.peak_rss_bytes)} of memory at most."
    )
    output.notes(report.notes)
    if report.not_copied_files:
        click.echo(f"left out, weights in other formats: {', '.join(report.not_copied_files[:5])}")
