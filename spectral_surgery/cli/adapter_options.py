"""Options of commands that make adapters: method, settings, and the modules that carry one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from spectral_surgery.adapters.from_update.fit_update import Size
    from spectral_surgery.commands.extract import LayerReport
    from spectral_surgery.targets import ModuleTargets

F = TypeVar("F", bound=Callable[..., object])

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

_NAME = re.compile(r"[\w.\-]+")


def setting_option(function: F) -> F:
    """-o: settings of the method."""
    return click.option(
        "-o",
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Setting of the method, repeatable; `spectral-surgery methods METHOD` lists them with their defaults.",
    )(function)


def method_options(function: F) -> F:
    """--method and -o: which adapter, and its settings."""
    return click.option(
        "--method",
        metavar="METHOD",
        required=True,
        help="Kind of adapter; `spectral-surgery methods` lists them.",
    )(setting_option(function))


def size_options(function: F) -> F:
    """How large an adapter may be, and in what numbers."""
    for option in reversed(
        (
            click.option(
                "--bytes", "nbytes", type=int, metavar="N", help="Bytes of the file, spent where they save most."
            ),
            click.option("--max-error", type=float, help="Relative error of ΔW of every layer, such as 0.3."),
            click.option("--rank", type=int, help="Rank of every layer: lora, foura."),
            click.option("--n-frequency", type=int, help="Coefficients of every layer: spectral_delta, fourierft."),
            click.option(
                "--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Stored."
            ),
        )
    ):
        function = option(function)
    return function


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
    """What the options of `target_options` and `trained_options` mean.

    A bias of ``only`` is left at none: the caller knows the method, and sets ``<method>_only``.

    Raises:
        click.BadParameter: when layers are no numbers.
        ConfigError: when a regular expression is none.
    """
    from spectral_surgery.targets import ModuleTargets

    return ModuleTargets(
        target_modules=_names(target_modules),
        exclude_modules=_names(exclude_modules),
        layers_to_transform=None if layers is None else numbers_of(layers),
        modules_to_save=tuple(modules_to_save.split(",")) if modules_to_save else (),
        bias="none" if bias == "only" else bias,
    )


def numbers_of(text: str) -> tuple[int, ...]:
    """Numbers of layers from a text such as 0,1,8-11.

    Raises:
        click.BadParameter: when it is none.
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise click.BadParameter(f"'{text}' is no list of numbers such as 0,1,8-11.", param_hint="--layers")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def size_of(
    method: str, nbytes: int | None, max_error: float | None, rank: int | None, n_frequency: int | None
) -> Size | None:
    """The one of the options of `size_options` that was given, None for none.

    Raises:
        click.UsageError: when there are several, or one counts what the method does not have.
        ConfigError: when the method is unknown, or the number out of range.
    """
    from spectral_surgery.adapters.from_update.fit_update import EXTRACTORS, Size

    unit = EXTRACTORS[method].unit
    given = {"--bytes": nbytes, "--max-error": max_error, "--rank": rank, "--n-frequency": n_frequency}
    chosen = [(option, value) for option, value in given.items() if value is not None]
    if not chosen:
        return None
    if len(chosen) > 1:
        raise click.UsageError(f"{', '.join(option for option, _ in chosen)}: exclude each other; one is accepted.")
    (option, value), own = chosen[0], f"--{unit.replace('_', '-')}"
    if option in ("--rank", "--n-frequency") and option != own:
        raise click.UsageError(f"{option}: {method} has none; {own} is accepted.")
    if option == "--bytes":
        return Size("bytes", value)
    return Size("max_error" if option == "--max-error" else "count", value)


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


def _names(text: str | None) -> tuple[str, ...] | str | None:
    if text is None or text == "all-linear":
        return text
    parts = text.split(",")
    return tuple(parts) if all(_NAME.fullmatch(part) for part in parts) else text
