"""Options of commands that make adapters: method, settings, and the modules that carry one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from spectral_surgery.targets import ModuleTargets

F = TypeVar("F", bound=Callable[..., object])

_NAME = re.compile(r"[\w.\-]+")


def method_options(function: F) -> F:
    """--method and -o: which adapter, and its settings."""
    function = click.option(
        "-o",
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Setting of the method, repeatable; `spectral-surgery methods METHOD` lists them with their defaults.",
    )(function)
    return click.option(
        "--method",
        metavar="METHOD",
        required=True,
        help="Kind of adapter; `spectral-surgery methods` lists them.",
    )(function)


def target_options(function: F) -> F:
    """Which modules: --target-modules, --exclude-modules and --layers."""
    function = click.option(
        "--layers", metavar="NUMBERS", help="Only in these layers of the model, such as 0,1,8-11; with a list of names."
    )(function)
    function = click.option("--exclude-modules", metavar="NAMES", help="Never in these, in the same terms.")(function)
    return click.option(
        "--target-modules",
        metavar="NAMES",
        help="Modules that get an adapter: ends of names with commas, a regular expression over whole names, or"
        " all-linear.",
    )(function)


def trained_options(function: F) -> F:
    """What is trained beside adapters: --modules-to-save and --bias."""
    function = click.option(
        "--bias",
        type=click.Choice(["none", "all", "only"]),
        default="none",
        show_default=True,
        help="Train biases too: all of the model, or only those of modules with an adapter.",
    )(function)
    return click.option(
        "--modules-to-save", metavar="NAMES", help="Modules trained and stored whole, such as a classifier."
    )(function)


def config_of(method: str, settings: tuple[str, ...]) -> Any:
    """The settings object of a method.

    Raises:
        ConfigError: for an unknown method or setting, or a value that is not accepted.
    """
    from spectral_surgery.adapters import METHODS
    from spectral_surgery.options import parse_settings

    return parse_settings(METHODS[method].config, settings)


def targets_of(
    target_modules: str | None,
    exclude_modules: str | None,
    layers: str | None,
    modules_to_save: str | None = None,
    bias: str = "none",
) -> ModuleTargets:
    """What the options of `target_options` and `trained_options` mean, ``only`` as ``<method>_only`` aside.

    Raises:
        click.BadParameter: when layers are no numbers.
        ConfigError: when a regular expression is none.
    """
    from spectral_surgery.targets import ModuleTargets

    return ModuleTargets(
        target_modules=_names(target_modules),
        exclude_modules=_names(exclude_modules),
        layers_to_transform=_numbers(layers),
        modules_to_save=tuple(modules_to_save.split(",")) if modules_to_save else (),
        bias=bias,
    )


def base_name(source: str) -> tuple[str, str | None]:
    """How an adapter names its base: (repository, revision), or (path, None)."""
    from spectral_surgery.hub import remote

    repository = remote(source)
    return (repository.name, repository.revision) if repository else (source, None)


def _names(text: str | None) -> tuple[str, ...] | str | None:
    if text is None or text == "all-linear":
        return text
    parts = text.split(",")
    return tuple(parts) if all(_NAME.fullmatch(part) for part in parts) else text


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise click.BadParameter(f"'{text}' is no list of numbers such as 0,1,8-11.", param_hint="--layers")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)
