"""spectral-surgery compress of several fine-tunes of one base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import from_options
from spectral_surgery.codec.rate import Target
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run

if TYPE_CHECKING:
    from spectral_surgery.commands.compress import CompressReport

_NOT_WITH = ("file", "heal", "shard", "push", "stream_push", "dry_run", "engine")  # parameters that mean one SOURCE


def compress_all(sources: Sequence[str], out: Path, target: Target, workers: int) -> None:
    """Compress the difference of each source to --base.

    Raises click.UsageError when there is no base, two have one name, or an option is for one source alone.
    """
    params = click.get_current_context().params
    given = [name for name in _NOT_WITH if params.get(name)]
    if params["base"] is None or given:
        raise click.UsageError(
            "several SOURCEs: expected with --base, and without --calibrate, --heal, --engine, --shard, --push and"
            " --dry-run. Compress them one by one."
        )
    from spectral_surgery.commands.compress.several import compress_several

    access = shared.hub_access()
    names = [Path(source.rstrip("/")).resolve().name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise click.UsageError(
            f"SOURCE: expected names that differ, for the folders in OUT, got {twice[0]} twice. Rename one."
        )
    before, name = access.others().locate(params["base"])
    options = from_options(CompressOptions, {"target": target, "base": name})
    found = {name: access.locate(source) for name, source in zip(names, sources, strict=True)}

    def say(name: str, report: CompressReport | None) -> None:
        if report is None:
            line = "finished before, left as it is"
        else:
            total = report.manifest.report
            line = (
                f"{total.bits_per_weight:.3f} bits per weight, relative error {total.relative_error:.4f} of the"
                f" difference, {output.size(report.output_bytes)}"
            )
        click.echo(f"{name}: {line}", err=True)

    with output.progress(" weights") as progress:
        more = {"workers": workers, "threads": shared.threads_or_all(workers=workers)}
        run = from_options(Run, more | {"origin": None, "progress": progress, "note": output.note})
        reports = compress_several(
            {name: checkpoint for name, (checkpoint, _) in found.items()},
            out,
            options,
            base=before,
            origins={name: origin for name, (_, origin) in found.items() if origin},
            run=run,
            finished=say,
        )
    folders = {name: {"finished_before": True} if one is None else one.to_json() for name, one in reports.items()}
    output.show({"finished": True, "folders": folders}, [f"{len(reports)} folders of differences in {out}."])
