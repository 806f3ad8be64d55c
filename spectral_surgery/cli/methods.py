"""spectral-surgery methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click

from spectral_surgery.cli import output
from spectral_surgery.errors import ConfigError


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(name: str | None, as_json: bool) -> None:
    """List what can be chosen: adapters, transforms, mixers and baselines, and where they come from.

    With the name of an adapter method or mixer, its settings for -o NAME=VALUE.

    \b
    Example:
      spectral-surgery methods
      spectral-surgery methods fourierft
    """
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.mixers import MIXERS

    rows = _rows()
    configs: dict[str, type[Any]] = {own.name: own.config for own in METHODS.values()}
    configs |= {own.name: own.config for own in MIXERS.values()}
    if name is not None and name in configs and fields(configs[name]):
        rows = _settings(configs[name])
    elif name is not None:
        rows = [row for row in rows if row["name"] == name]
        if not rows:
            raise ConfigError(f"methods '{name}': unknown; `spectral-surgery methods` lists the known ones.")
    if as_json:
        output.print_json("methods", {"methods": rows})
    else:
        click.echo(output.table(rows))


def _settings(config: type[Any]) -> list[Mapping[str, object]]:
    from spectral_surgery.options import settings_of

    return [
        {"setting": own.name, "accepts": own.accepts, "default": str(own.default), "what": own.help}
        for own in settings_of(config)
    ]


def _rows() -> list[Mapping[str, object]]:
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.baselines import BASELINES
    from spectral_surgery.mixers import MIXERS
    from spectral_surgery.transforms import TRANSFORMS

    rows: list[Mapping[str, object]] = [
        {"kind": "adapter", "name": m.name, "what": f"PEFT type {m.peft_type}. {m.source}"} for m in METHODS.values()
    ]
    rows += [
        {"kind": "transform", "name": t.name, "what": f"lengths: {t.lengths}. {t.source}"} for t in TRANSFORMS.values()
    ]
    rows += [{"kind": "mixer", "name": m.name, "what": f"causal: {m.is_causal}. {m.source}"} for m in MIXERS.values()]
    rows += [{"kind": "baseline", "name": b.name, "what": b.help} for b in BASELINES.values()]
    return rows
