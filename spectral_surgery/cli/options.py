"""Options of a command from the fields of settings: type, default and help are written once, at the field.

`options_of` makes an option of each field, and `from_options` the settings from what was typed. A field says in its
metadata:

- ``help``: what it does;
- ``unset``: what happens without the option, where the default value does not say it; empty to say nothing;
- ``least``, ``most``, ``above``, ``below``: the range of a number;
- ``flags``: other names of the option, such as ``--lr``;
- ``bytes``: a number that may have a unit, such as 500MB;
- ``metavar``, and ``repeatable``: the option may come several times, in place of a list with commas.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import click

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

_OPEN_FLAG = bool | None  # what happens without the option, code decides
_NAME = re.compile(r"[\w.\-]+")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


class Command(click.Command):
    """A command whose function gets only the values it names; `from_options` has the others."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        """The same names wherever a context comes from: click keeps the option that the first one has made."""
        return ["-h", "--help"]

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function."""
        function = cast("Callable[..., object]", self.callback)
        return ctx.invoke(function, **{name: ctx.params[name] for name in signature(function).parameters})


class SettingOption(click.Option):
    """The option of one field of settings."""

    def __init__(
        self, param_decls: Sequence[str], settings: Any, field: Field[Any], required: bool = True, help: str = ""
    ) -> None:
        """Read the field; see `options_of`."""
        self.settings, self.field = settings if isinstance(settings, type) else type(settings), field
        more, hint = field.metadata, get_type_hints(self.settings)[field.name]
        default = field.default if isinstance(settings, type) else getattr(settings, field.name)
        several, unset = bool(more.get("repeatable")), more.get("unset") if default == field.default else None
        has_default, flag = default not in (MISSING, ()) and unset is None, hint in (bool, _OPEN_FLAG)
        value: dict[str, Any] = {"default": default} if has_default else {}  # None would be a default for click too
        if hint == _OPEN_FLAG:
            value = {"default": None}  # click would take False
        text = help or more.get("help", "")
        super().__init__(
            param_decls,
            type=str if several else type_of(hint, more),
            required=required and default is MISSING,
            multiple=several,
            is_flag=flag,
            help=f"{text}  [default: {unset}]" if unset else text,
            metavar=more.get("metavar"),
            show_default=has_default and default is not None and default is not False,
            **value,
        )


def options_of(
    settings: Any,
    *only: str,
    flags: Mapping[str, str] | None = None,
    help: Mapping[str, str] | None = None,
    required: bool = True,
) -> Callable[[F], F]:
    """Options for fields of settings.

    Args:
        settings: a dataclass, or an object of it, whose values are the defaults then.
        flags: names of the option by field, in place of ``--field-name``, with spaces between them.
        help: texts by field, where the command has more to say than the field.
        required: whether fields without a default have to be given; see `optional_settings`.
    """
    known = {field.name: field for field in fields(settings)}
    known_by = settings if isinstance(settings, type) else type(settings)

    def decorate(function: F) -> F:
        for name in reversed(only or tuple(known)):
            two_sided = known[name].default is True or get_type_hints(known_by)[name] == _OPEN_FLAG
            usual = f"--{name}/--no-{name}" if two_sided else f"--{name}"
            names = (flags or {}).get(name, usual.replace("_", "-")).split()
            more = {"settings": settings, "field": known[name], "required": required, "help": (help or {}).get(name)}
            function = click.option(*names, *known[name].metadata.get("flags", ()), cls=SettingOption, **more)(function)
        return function

    return decorate


def from_options(settings: type[T], values: Mapping[str, object] | None = None) -> T:
    """The settings that the running command was given. ``values``: of fields that have no option."""
    return settings(**_typed(settings) | dict(values or {}))


def optional_settings(settings: type[T], values: Mapping[str, object] | None = None) -> T | None:
    """The same; None unless the options of all fields without a default were given."""
    typed = _typed(settings)
    needed = {option.field.name for option in _options(settings) if option.field.default is MISSING}
    return from_options(settings, values) if needed <= typed.keys() else None


def _options(settings: type[Any]) -> list[SettingOption]:
    options = click.get_current_context().command.params
    return [option for option in options if isinstance(option, SettingOption) and option.settings is settings]


def _typed(settings: type[Any]) -> dict[str, Any]:
    params = click.get_current_context().params
    values = {option.field.name: params[str(option.name)] for option in _options(settings)}
    return {name: value for name, value in values.items() if value is not None}


def type_of(hint: Any, more: Mapping[str, Any]) -> Any:
    """What click makes of the type of a field: one of its types, or a function that reads the text."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return names if str in parts and len(parts) > 2 else type_of(parts[0], more)
    low, high = more.get("least", more.get("above")), more.get("most", more.get("below"))
    if kind is None and (low, high) != (None, None):
        ranges: Any = click.IntRange if hint is int else click.FloatRange
        return ranges(low, high, min_open="above" in more, max_open="below" in more)
    if kind is Literal:
        return click.Choice(parts)
    if kind is tuple:
        return numbers if parts[0] is int else texts
    return nbytes if more.get("bytes") else click.Path(path_type=Path) if hint is Path else hint


def texts(text: str) -> tuple[str, ...]:
    """Texts with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def names(text: str) -> tuple[str, ...] | str:
    """Names with commas between them; all-linear and regular expressions stay as they are."""
    parts = text.split(",")
    return tuple(parts) if text != "all-linear" and all(map(_NAME.fullmatch, parts)) else text


def numbers(text: str) -> tuple[int, ...]:
    """Numbers and ranges of them, such as 0,1,8-11."""
    spans = [part.partition("-") for part in text.split(",")]
    if not all(first.isdigit() and (last or first).isdigit() for first, _, last in spans):
        raise click.BadParameter(f"expected numbers such as 0,1,8-11, got '{text}'.")
    return tuple(number for first, _, last in spans for number in range(int(first), int(last or first) + 1))


def factors(text: str) -> list[float]:
    """Numbers with commas between them, such as 1,0.5."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 1,0.5, got '{text}'.") from None


def nbytes(text: str | int) -> int:
    """Bytes from a size such as 500MB; a default is a number."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise click.BadParameter(f"expected a size such as 500MB or 2GB, got '{text}'.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def only_one(*options: str) -> tuple[str, Any] | None:
    """The name and the value of the one of these options that was given; None for none.

    Raises click.UsageError when there are several.
    """
    ctx = click.get_current_context()
    flags = {option.name: option.opts[0] for option in ctx.command.params}
    typed = [name for name in options if ctx.params[name] is not None]
    if len(typed) > 1:
        raise click.UsageError(f"expected one of {', '.join(flags[name] for name in typed)}, got all. Use one.")
    return (typed[0], ctx.params[typed[0]]) if typed else None
