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

_NAME = re.compile(r"[\w.\-]+")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


class Command(click.Command):
    """A command whose function gets only the values it names; `from_options` has the others."""

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function."""
        function = cast("Callable[..., object]", self.callback)
        return ctx.invoke(function, **{name: ctx.params[name] for name in signature(function).parameters})


class SettingOption(click.Option):
    """The option of one field of settings."""

    def __init__(self, param_decls: Sequence[str], settings: Any, field: Field[Any], *, help: str = "") -> None:
        """Read the field.

        Args:
            param_decls: names of the option.
            settings: a dataclass, or an object of it, whose values are the defaults then.
            field: of it.
            help: in place of the field's.
        """
        self.settings, self.field = settings if isinstance(settings, type) else type(settings), field.name
        more, hint = field.metadata, get_type_hints(self.settings)[field.name]
        default = field.default if isinstance(settings, type) else getattr(settings, field.name)
        several, unset = bool(more.get("repeatable")), more.get("unset") if default == field.default else None
        has_default = default not in (MISSING, ()) and unset is None
        text = help or more.get("help", "")
        super().__init__(
            param_decls,
            type=str if several else type_of(hint, more),
            default=default if has_default else None,
            required=default is MISSING,
            multiple=several,
            is_flag=hint is bool,
            help=f"{text}  [default: {unset}]" if unset else text,
            metavar=more.get("metavar"),
            show_default=has_default and default is not None and default is not False,
        )


def options_of(
    settings: Any, *only: str, flags: Mapping[str, str] | None = None, help: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Options for fields of settings.

    Args:
        settings: a dataclass, or an object of it, whose values are the defaults then.
        only: these fields, in order; all by default.
        flags: names of the option by field, in place of ``--field-name``, with spaces between them.
        help: texts by field, where the command has more to say than the field.
    """
    known = {field.name: field for field in fields(settings)}

    def decorate(function: F) -> F:
        for name in reversed(only or tuple(known)):
            usual = f"--{name}/--no-{name}" if known[name].default is True else f"--{name}"
            flag = (flags or {}).get(name, usual.replace("_", "-"))
            decls, text = (*flag.split(), *known[name].metadata.get("flags", ())), (help or {}).get(name, "")
            function = click.option(*decls, cls=SettingOption, settings=settings, field=known[name], help=text)(
                function
            )
        return function

    return decorate


def from_options(settings: type[T], values: Mapping[str, object] | None = None) -> T:
    """The settings that the running command was given.

    Args:
        settings: a dataclass.
        values: of fields that have no option of their own.
    """
    ctx = click.get_current_context()
    typed = {
        option.field: ctx.params[str(option.name)]
        for option in ctx.command.params
        if isinstance(option, SettingOption) and option.settings is settings
    }
    return settings(**{name: value for name, value in typed.items() if value is not None} | dict(values or {}))


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
        raise click.BadParameter(f"'{text}' is not a list of numbers such as 0,1,8-11.")
    return tuple(number for first, _, last in spans for number in range(int(first), int(last or first) + 1))


def factors(text: str) -> list[float]:
    """Numbers with commas between them, such as 1,0.5."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a list of numbers such as 1,0.5.") from None


def nbytes(text: str) -> int:
    """Bytes from a size such as 500MB."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"'{text}' is not a size such as 500MB or 2GB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def only_one(values: Mapping[str, object]) -> tuple[str, Any] | None:
    """The one of several options that was given, and its value; None for none.

    Raises:
        click.UsageError: when there are several.
    """
    present = [(option, value) for option, value in values.items() if value is not None]
    if len(present) > 1:
        raise click.UsageError(f"{', '.join(option for option, _ in present)} exclude each other; use one of them.")
    return present[0] if present else None
