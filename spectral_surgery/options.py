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
    for own in fields(config):
        default = own.default_factory() if own.default_factory is not MISSING else own.default
        yield Setting(own.name, said(hints[own.name]), default, own.metadata.get("help", ""))


def parse_settings(config: type[T], pairs: Sequence[str]) -> T:
    """Make a settings object from texts.

    Args:
        config: a dataclass.
        pairs: ``name=value``; a mapping as JSON. Of a name that comes twice, the last one counts.

    Returns:
        The settings, the others at their defaults.

    Raises:
        ConfigError: for a text that is no pair, an unknown name, or a value that is not accepted.
    """
    hints = get_type_hints(config)
    known = {own.name: own for own in settings_of(config)}
    values = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found:
            raise ConfigError(f"setting '{pair}': is no NAME=VALUE; such as {next(iter(known))}=... is accepted.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"setting '{name}': unknown; {', '.join(known)} are accepted.{hint}")
        try:
            values[name] = _parsed(hints[name], text)
        except ValueError:
            own = known[name]
            raise ConfigError(f"{name} '{text}': is not accepted; {own.accepts} is. {own.help}") from None
    return config(**values)


def said(hint: Any) -> str:
    """A type in words: ``a whole number``, ``dct or hartley``."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(said(part) for part in parts)
    if kind is Literal:
        return " or ".join(map(str, parts))
    if kind is not None:
        return f'{{"pattern": {said(parts[1])}}}'
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
        found = json.loads(text)  # its error is a ValueError
        if not isinstance(found, dict):
            raise ValueError(text)
        return {key: _parsed(parts[1], json.dumps(value)) for key, value in found.items()}
    return _chosen(_TRUTH, text.lower()) if hint is bool else hint(text)


def _chosen(choices: Mapping[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError(text)
    return choices[text]
