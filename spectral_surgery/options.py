"""Settings given as text, read by the types of the dataclass they belong to; the help is in the fields' metadata."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from spectral_surgery.errors import ConfigError

T = TypeVar("T")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Setting:
    """One setting: its name, the values it accepts in words, its default, and what it does."""

    name: str
    accepts: str
    default: object
    help: str


def settings_of(config: type[Any]) -> Iterator[Setting]:
    """The settings of a dataclass, in order."""
    hints = get_type_hints(config)
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield Setting(field.name, in_words(hints[field.name]), default, field.metadata.get("help", ""))


def parse_settings(config: type[T], pairs: Sequence[str]) -> T:
    """Make a settings object from texts such as ``name=value``, the other settings at their defaults.

    A mapping is written as JSON. Of a name that comes twice, the last one counts.

    Raises ConfigError for a text that is not a pair, an unknown name, or a value of another type.
    """
    hints = get_type_hints(config)
    known = {setting.name: setting for setting in settings_of(config)}
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"-o {pair}: expected NAME=VALUE, such as {next(iter(known))}=..., got '{pair}'.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"-o {pair}: expected one of {', '.join(known)}, got '{name}'.{hint}")
        try:
            values[name] = _parsed(hints[name], text)
        except ValueError:
            setting = known[name]
            raise ConfigError(f"-o {pair}: expected {setting.accepts}, got '{text}'. {setting.help}") from None
    return config(**values)


def in_words(hint: Any) -> str:
    """A type in words: ``a whole number``, ``dct or hartley``."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in parts)
    if kind is Literal:
        return " or ".join(map(str, parts))
    if kind is not None:
        return f'{{"pattern": {in_words(parts[1])}}}'
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a text")


def _parsed(hint: Any, text: str) -> Any:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        for part in parts:
            try:
                return _parsed(part, text)
            except ValueError:
                continue
        raise ValueError(text)
    if kind is Literal:
        return _chosen({str(part): part for part in parts}, text)
    if kind is not None:
        mapping = json.loads(text)  # its error is a ValueError
        if not isinstance(mapping, dict):
            raise ValueError(text)
        return {key: _parsed(parts[1], json.dumps(value)) for key, value in mapping.items()}
    return _chosen(_TRUTH, text.lower()) if hint is bool else hint(text)


def _chosen(choices: Mapping[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]
