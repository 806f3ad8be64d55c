"""Options of commands that make adapters: method, settings, and the modules that carry one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from spectral_surgery.cli.options import from_options, only_one, options_of
from spectral_surgery.cli.shared import all_of
from spectral_surgery.targets import ModuleTargets

if TYPE_CHECKING:
    from spectral_surgery.adapters.base import AdapterSpec
    from spectral_surgery.adapters.from_update.fit_update import Size
    from spectral_surgery.commands.extract import LayerReport

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

setting_option = click.option(
    *("-o", "--set", "settings"),
    multiple=True,
    metavar="NAME=VALUE",
    help="Setting of the method, repeatable; `spectral-surgery methods METHOD` lists them with their defaults.",
)
method_options = all_of(
    click.option(
        "--method", metavar="METHOD", required=True, help="Kind of adapter; `spectral-surgery methods` lists them."
    ),
    setting_option,
)
size_options = all_of(
    click.option("--bytes", "nbytes", type=int, metavar="N", help="Bytes of the file, spent where they save most."),
    click.option("--max-error", type=float, help="Relative error of ΔW of every layer, such as 0.3."),
    click.option("--rank", type=int, help="Rank of every layer: lora, foura."),
    click.option("--n-frequency", type=int, help="Coefficients of every layer: spectral_delta, fourierft."),
    click.option("--dtype", type=click.Choice(list(_DTYPES)), default="float32", show_default=True, help="Stored."),
)
target_options = options_of(
    *(ModuleTargets, "target_modules", "exclude_modules", "layers_to_transform"),
    flags={"layers_to_transform": "--layers"},
)
trained_options = all_of(
    options_of(ModuleTargets, "modules_to_save"),
    click.option(
        "--bias",
        type=click.Choice(["none", "all", "only"]),
        default="none",
        show_default=True,
        help="Train biases too: all of the model, or only those of modules with an adapter.",
    ),
)


def spec_of(base: str, revision: str | None, bias: str) -> AdapterSpec:
    """A new adapter for a base model, as the options of this module say."""
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.adapters.base import AdapterSpec

    row = METHODS[click.get_current_context().params["method"]]
    targets = from_options(ModuleTargets, {"bias": f"{row.name}_only" if bias == "only" else bias})
    name, at = base_name(base)
    return AdapterSpec(row, config_of(row.name), targets, name, revision or at)


def config_of(method: str) -> Any:
    """The settings of a method, as -o says.

    Raises ConfigError for an unknown method or setting, or a value of another type.
    """
    from spectral_surgery.adapters import METHODS

    config = METHODS[method].config
    return config(**typed_settings(config))


def typed_settings(config: type[Any]) -> dict[str, Any]:
    """What -o says, without the settings that stay at their defaults."""
    from spectral_surgery.options import parse_settings

    pairs = click.get_current_context().params["settings"]
    parsed = parse_settings(config, pairs)
    return {name: getattr(parsed, name) for name in (pair.partition("=")[0] for pair in pairs)}


def size_of(method: str) -> Size | None:
    """The one of the options of `size_options` that was given, None for none.

    Raises:
        click.UsageError: when there are several, or one counts what the method does not have.
        ConfigError: when the method is unknown, or the number out of range.
    """
    from spectral_surgery.adapters.from_update.fit_update import EXTRACTORS, Size

    unit, chosen = EXTRACTORS[method].unit, only_one("nbytes", "max_error", "rank", "n_frequency")
    if chosen is None:
        return None
    name, value = chosen
    if name in ("nbytes", "max_error"):
        return Size("bytes" if name == "nbytes" else "max_error", value)
    if name != unit:
        raise click.UsageError(f"expected --{unit.replace('_', '-')} for {method}, got --{name.replace('_', '-')}.")
    return Size("count", value)


def stored_dtype() -> str:
    """What --dtype says, by the name that safetensors has for it."""
    return _DTYPES[click.get_current_context().params["dtype"]]


def layer_rows(layers: Sequence[LayerReport], unit: str) -> list[dict[str, object]]:
    """Rows of a table of layers with their errors."""
    floors = any(layer.floor > 0 for layer in layers)
    return [
        {
            "layer": layer.layer,
            "shape": layer.shape,
            unit: layer.components,
            "bytes": layer.stored_bytes,
            "relative error": layer.relative_error,
            "energy kept": layer.energy_kept,
        }
        | ({"least possible error": layer.floor} if floors else {})
        for layer in layers
    ]


def base_name(source: str) -> tuple[str, str | None]:
    """How an adapter names its base: (repository, revision), or (path, None)."""
    from spectral_surgery.hub import remote

    repository = remote(source)
    return (repository.name, repository.revision) if repository else (source, None)
