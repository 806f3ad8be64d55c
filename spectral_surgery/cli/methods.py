"""spectral-surgery methods."""

from __future__ import annotations

from collections.abc import Mapping

import click

from spectral_surgery.cli import output
from spectral_surgery.errors import ConfigError


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(name: str | None, as_json: bool) -> None:
    """List what can be chosen: transforms, baselines and benchmarks, with what they are and where they come from.

    \b
    Example:
      spectral-surgery methods
      spectral-surgery methods dct
    """
    rows = _rows()
    if name is not None:
        rows = [row for row in rows if row["name"] == name]
        if not rows:
            raise ConfigError(f"methods '{name}': unknown; `spectral-surgery methods` lists the known ones.")
    if as_json:
        output.print_json("methods", {"methods": rows})
    else:
        click.echo(output.table(rows))


def _rows() -> list[Mapping[str, object]]:
    from spectral_surgery.bench import CASES
    from spectral_surgery.bench.baselines import BASELINES
    from spectral_surgery.transforms import TRANSFORMS

    rows: list[Mapping[str, object]] = [
        {"kind": "transform", "name": t.name, "what": f"lengths: {t.lengths}. {t.source}"} for t in TRANSFORMS.values()
    ]
    rows += [{"kind": "baseline", "name": b.name, "what": b.help} for b in BASELINES.values()]
    rows += [{"kind": "bench", "name": c.name, "what": c.help} for c in CASES.values()]
    return rows
