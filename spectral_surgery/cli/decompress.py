"""spectral-surgery decompress."""

from __future__ import annotations

from pathlib import Path

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.memory import keep_freed_memory

CHECK_FAILED = 3


@click.command("decompress")
@shared.source_argument
@shared.out_argument
@click.option("--dtype", help="Store floating tensors as float32, bfloat16, ... instead of their original dtype.")
@shared.base_option("The checkpoint that SOURCE holds differences to.")
@click.option(
    "--verify", is_flag=True, help="Read the result back and check it; exit with 3 and publish nothing if wrong."
)
@shared.threads_option
@shared.hub_options
@shared.push_option
@shared.writing_options
@shared.output_options
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    out: Path,
    dtype: str | None,
    verify: bool,
    threads: int | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn a compressed folder back into a plain checkpoint that every other tool reads.

    Names, shapes and dtypes are the original ones; tensors that were copied keep their bits, tied ones get both names
    back. Checksums are always verified.

    \b
    Example:
      spectral-surgery decompress ./model-4bit ./model-plain --verify
    """
    from spectral_surgery.commands import decompress as workflow

    keep_freed_memory()
    access = shared.hub_access(quiet=quiet)
    if dry_run:
        with access.outline(source) as found:
            _show_plan(found.path, as_json=as_json)
        return
    access.prepare()
    path, origin = access.resolve(source)
    with output.progress(quiet=quiet, unit=" tensors") as progress:
        report = workflow.decompress(
            path,
            out,
            dtype=dtype,
            verify=verify,
            threads=shared.threads_or_all(threads),
            overwrite=overwrite,
            base=access.base()[0],
            origin=origin,
            progress=progress,
        )
    pushed = {} if report.failures else access.pushed(out)
    if as_json:
        output.print_json("decompress", report.to_json() | pushed)
    elif not report.failures:
        checked = ", read back and verified" if report.verified else ""
        click.echo(
            f"{report.tensors} tensors, {output.size(report.output_bytes)}, in {report.seconds:.1f} s{checked}: {out}"
        )
    for failure in report.failures:
        click.echo(f"Check failed: {failure}", err=True)
    if report.failures:
        ctx.exit(CHECK_FAILED)


def _show_plan(path: Path, *, as_json: bool) -> None:
    from spectral_surgery.files.compressed.checkpoint import open_compressed

    manifest = open_compressed(path, differences=True).manifest
    weights, tensors = sum(r.report.weights for r in manifest.tensors.values()), len(manifest.tensors)
    if as_json:
        body = {"dry_run": True, "compressed_tensors": tensors, "weights": weights, "tied": manifest.aliases}
        output.print_json("decompress", body)
    else:
        click.echo(f"{tensors} compressed tensors with {weights:,} weights. Nothing was written.")
