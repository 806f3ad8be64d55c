"""spectral-surgery decompress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command
from spectral_surgery.memory import keep_freed_memory

if TYPE_CHECKING:
    from spectral_surgery.files.storage import Checkpoint


@click.command("decompress", cls=Command)
@shared.source_argument
@shared.out_argument
@click.option("--dtype", help="Store floating tensors as float32, bfloat16, ... instead of their original dtype.")
@click.option("--base", metavar="BASE", help="The checkpoint that SOURCE holds differences to.")
@click.option(
    "--verify", is_flag=True, help="Read the result back and check it; exit with 3 and publish nothing if wrong."
)
@shared.threads_option
@shared.reading_options
@shared.writing_options
def command(
    source: str, out: Path, dtype: str | None, base: str | None, verify: bool, dry_run: bool, overwrite: bool
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
    access = shared.hub_access()
    if dry_run:
        _show_plan(access.locate(source, headers=True)[0])
        return
    path, origin = access.prepare().locate(source)
    with output.progress(" tensors") as progress:
        report = workflow.decompress(
            path,
            out,
            dtype=dtype,
            verify=verify,
            threads=shared.threads_or_all(),
            overwrite=overwrite,
            base=access.others().locate(base)[0] if base else None,
            origin=origin,
            progress=progress,
        )
    checked = ", read back and verified" if report.verified else ""
    line = f"{report.tensors} tensors, {output.size(report.output_bytes)}, in {report.seconds:.1f} s{checked}: {out}"
    pushed = {} if report.failures else access.pushed(out)
    output.show(report.to_json() | pushed, [] if report.failures else [line])
    for failure in report.failures:
        click.echo(f"Check failed: {failure}", err=True)
    if report.failures:
        click.get_current_context().exit(shared.CHECK_FAILED)


def _show_plan(path: Checkpoint) -> None:
    from spectral_surgery.files.compressed.checkpoint import open_compressed

    manifest = open_compressed(path, differences=True).manifest
    weights, tensors = sum(r.report.weights for r in manifest.tensors.values()), len(manifest.tensors)
    output.show(
        {"dry_run": True, "compressed_tensors": tensors, "weights": weights, "tied": manifest.aliases},
        [f"{tensors} compressed tensors with {weights:,} weights. Nothing was written."],
    )
