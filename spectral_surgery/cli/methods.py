"""spectral-surgery methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command
from spectral_surgery.errors import ConfigError


@click.command("methods", cls=Command)
@click.argument("name", required=False)
@shared.json_option
def command(name: str | None) -> None:
    """List what can be chosen: adapters, transforms, mixers, baselines and targets of export, and where they come from.

    With the name of an adapter method, mixer or target, its settings for -o NAME=VALUE.

    \b
    Example:
      spectral-surgery methods
      spectral-surgery methods fourierft
    """
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.commands.export import TARGETS, ModelTarget
    from spectral_surgery.mixers import MIXERS

    rows = _rows()
    configs: dict[str, type[Any]] = {name: row.config for name, row in METHODS.items()}
    configs |= {name: row.config for name, row in MIXERS.items()}
    configs |= {name: row.config for name, row in TARGETS.items() if isinstance(row, ModelTarget)}
    if name is not None and name in configs and fields(configs[name]):
        rows = _settings(configs[name])
    elif name is not None:
        rows = [row for row in rows if row["name"] == name]
        if not rows:
            raise ConfigError(f"methods: expected the name of a method, got '{name}'. See `spectral-surgery methods`.")
    output.show({"methods": rows}, [output.table(rows)])


def _settings(config: type[Any]) -> list[Mapping[str, object]]:
    from spectral_surgery.options import settings_of

    return [
        {"setting": setting.name, "accepts": setting.accepts, "default": str(setting.default), "what": setting.help}
        for setting in settings_of(config)
    ]


def _rows() -> list[Mapping[str, object]]:
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.baselines import BASELINES
    from spectral_surgery.commands.export import TARGETS, ModelTarget
    from spectral_surgery.mixers import MIXERS
    from spectral_surgery.transforms import TRANSFORMS

    kinds = {
        "adapter": [(m.name, f"PEFT type {m.peft_type}. {m.source}") for m in METHODS.values()],
        "transform": [(t.name, f"lengths: {t.lengths}. {t.source}") for t in TRANSFORMS.values()],
        "mixer": [(m.name, f"causal: {m.is_causal}. {m.source}") for m in MIXERS.values()],
        "baseline": [(b.name, b.help) for b in BASELINES.values()],
        "target": [(t.name, t.help) for t in TARGETS.values() if isinstance(t, ModelTarget)],
    }
    return [{"kind": kind, "name": name, "what": what} for kind, rows in kinds.items() for name, what in rows]
