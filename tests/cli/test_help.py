"""The text of every --help, and the signature of every public name: a change of either is seen in review.

After a change that is meant, write the files anew and commit them with it: ``python -m tests.cli.test_help``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import spectral_surgery
from spectral_surgery import live
from spectral_surgery.cli import cli

HELP = Path(__file__).parent / "help"
SIGNATURES = Path(__file__).parent / "signatures.txt"


def commands() -> dict[str, click.Command]:
    """Every command by the words that call it."""
    context = click.Context(cli)
    named: dict[str, click.Command] = {"spectral-surgery": cli}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        named[name] = command
    _, scratch, _ = cli.resolve_command(context, ["train", "--init", "fftnet"])
    assert scratch is not None
    return named | {"train --init": scratch}


def help_text(name: str) -> str:
    """What --help prints on a terminal of 80 columns."""
    words = {"spectral-surgery": [], "train --init": ["train", "--init", "fftnet"]}.get(name, [name])
    arguments = {"prog_name": "spectral-surgery", "env": {"COLUMNS": "80"}}
    return CliRunner().invoke(cli, [*words, "--help"], **arguments).output


def file_of(name: str) -> Path:
    return HELP / f"{name.replace(' --', '-')}.txt"


def shown(value: Any) -> str:
    """A default value: without addresses in memory, and of settings only what is not at its default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        settings = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        changed = [f"{field.name}={setting!r}" for field, setting in settings if setting != field.default]
        return f"{type(value).__name__}({', '.join(changed)})"
    return str(getattr(value, "__qualname__", repr(value)))


def parameters_of(value: Any) -> Iterator[str]:
    """How something is called: names, annotations and defaults; an asterisk before what is given by name only."""
    for parameter in inspect.signature(value).parameters.values():
        star = {parameter.KEYWORD_ONLY: "* ", parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        annotation = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        yield f"{star.get(parameter.kind, '')}{parameter.name}{annotation}{default}"


def lines_of(name: str, value: Any) -> Iterator[str]:
    """What a user can write with a public name: parameters, methods and properties of a class, rows of a table."""
    if not callable(value):
        yield f"{name}: {', '.join(value) if isinstance(value, Mapping) else type(value).__name__}"
        return
    yield f"{name}:"
    if not (isinstance(value, type) and issubclass(value, Exception)):
        yield from (f"    {line}" for line in parameters_of(value))
    for member, function in sorted(vars(value).items()) if isinstance(value, type) else ():
        if isinstance(function, property) and not member.startswith("_"):
            yield f"    .{member}"
        elif inspect.isroutine(function) and not member.startswith("_"):
            yield f"    .{member}({', '.join(parameters_of(getattr(value, member)))})"


def signatures() -> str:
    """All public names, a block each."""
    public = [(name, getattr(spectral_surgery, name)) for name in sorted(spectral_surgery.__all__)]
    public += [(f"live.{name}", getattr(live, name)) for name in sorted(live.__all__)]
    return "\n".join(line for name, value in public for line in lines_of(name, value)) + "\n"


@pytest.mark.parametrize("name", list(commands()))
def test_the_help_is_as_in_its_file(name: str) -> None:
    assert help_text(name) == file_of(name).read_text(encoding="utf-8")


def test_there_is_no_file_without_a_command() -> None:
    assert {path.name for path in HELP.iterdir()} == {file_of(name).name for name in commands()}


def test_the_signatures_are_as_in_the_file() -> None:
    assert signatures() == SIGNATURES.read_text(encoding="utf-8")


def test_every_option_says_what_it_does() -> None:
    options = [
        (name, option)
        for name, command in commands().items()
        for option in command.params
        if isinstance(option, click.Option)
    ]
    assert not [(name, option.name) for name, option in options if not option.help]


def main() -> None:
    """Write all files anew."""
    for path in HELP.iterdir():
        path.unlink()
    for name in commands():
        file_of(name).write_text(help_text(name), encoding="utf-8")
    SIGNATURES.write_text(signatures(), encoding="utf-8")


if __name__ == "__main__":
    main()
