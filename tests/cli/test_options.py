"""Options made from fields: what is written at a field is what the command line takes, says and hands over."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from spectral_surgery.cli.options import Command, from_options, only_one, optional_settings, options_of
from spectral_surgery.errors import ConfigError
from spectral_surgery.training.settings import DistillSettings


@dataclass(frozen=True)
class Settings:
    """One field of every kind."""

    file: Path = field(metadata={"help": "A file."})
    rate: float = field(default=0.5, metadata={"help": "A rate.", "above": 0, "most": 1, "flags": ("-r",)})
    steps: int | None = field(default=None, metadata={"help": "Steps.", "least": 1, "unset": "enough"})
    seed: int = field(default=0, metadata={"help": "A seed."})
    kind: Literal["a", "b"] | None = field(default=None, metadata={"help": "A kind."})
    memory: int = field(default=7, metadata={"help": "Memory.", "bytes": True})
    globs: tuple[str, ...] = field(default=(), metadata={"help": "Globs.", "repeatable": True})
    columns: tuple[str, ...] = field(default=(), metadata={"help": "Columns."})
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "Layers."})
    targets: tuple[str, ...] | str | None = field(default=None, metadata={"help": "Targets."})
    norm: bool = field(default=True, metadata={"help": "A norm."})
    fast: bool = field(default=False, metadata={"help": "Fast."})


def settings_from(*arguments: str, source: object = Settings, required: bool = True) -> tuple[Settings | None, str]:
    """What a command is handed, and what it prints."""
    received: list[Settings | None] = []

    @click.command("command", cls=Command)
    @click.argument("name")
    @options_of(source, flags={"file": "--data"}, required=required)
    def command(name: str) -> None:
        assert name == "x"
        received.append(from_options(Settings) if required else optional_settings(Settings, {"seed": 9}))

    outcome = CliRunner().invoke(command, [*arguments, "x"], auto_envvar_prefix="CLI")
    return (received or [None])[0], outcome.output


def test_defaults_are_those_of_the_fields() -> None:
    assert settings_from("--data", "f")[0] == Settings(Path("f"))
    other = Settings(Path("g"), rate=0.25, steps=3, norm=False)
    assert settings_from(source=other)[0] == other
    assert settings_from(required=False)[0] is None
    assert settings_from("--data", "f", required=False)[0] == Settings(Path("f"), seed=9)


def test_every_kind_of_field() -> None:
    words = "--data f -r 1 --steps 2 --seed 3 --kind b --memory 1.5kB --globs x --globs y --columns a,b --layers 0,2-4"
    expected = Settings(Path("f"), 1.0, 2, 3, "b", 1500, ("x", "y"), ("a", "b"), (0, 2, 3, 4), ("q", "v"), False, True)
    assert settings_from(*words.split(), "--targets", "q,v", "--no-norm", "--fast")[0] == expected
    for text in ("all-linear", r".*\.(q|v)"):
        settings = settings_from("--data", "f", "--targets", text)[0]
        assert settings is not None
        assert settings.targets == text


def test_an_option_says_what_the_field_says() -> None:
    text = " ".join(settings_from("--help")[1].split())
    for words in (
        "--data PATH A file. [required]",
        "-r, --rate FLOAT RANGE A rate. [default: 0.5; 0<x<=1]",
        "--steps INTEGER RANGE Steps. [default: enough] [x>=1]",
        "--seed INTEGER A seed. [default: 0]",
        "--kind [a|b] A kind. --memory",
        "--norm / --no-norm A norm. [default: norm]",
        "--fast Fast.",
    ):
        assert words in text
    text = " ".join(settings_from("--help", source=Settings(Path(), steps=3))[1].split())
    assert "--steps INTEGER RANGE Steps. [default: 3; x>=1]" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "Missing option '--data'"),
        ("--data f --rate 0", "'--rate' / '-r': 0.0 is not in the range 0<x<=1."),
        ("--data f --steps 0", "'--steps': 0 is not in the range x>=1."),
        ("--data f --kind c", "'--kind': 'c' is not one of 'a', 'b'."),
        ("--data f --layers 1-a", "'--layers': expected numbers such as 0,1,8-11, got '1-a'."),
        ("--data f --memory much", "'--memory': expected a size such as 500MB or 2GB, got 'much'."),
    ],
)
def test_wrong_values_are_wrong_usage(arguments: str, text: str) -> None:
    settings, printed = settings_from(*arguments.split())
    assert settings is None
    assert text in printed.replace("'-r' / '--rate'", "'--rate' / '-r'")


def test_options_that_exclude_each_other() -> None:
    @click.command("command", cls=Command)
    @options_of(DistillSettings, "steps", "minutes")
    def command() -> None:
        click.echo(repr(only_one("steps", "minutes")))
        click.echo(repr(from_options(DistillSettings).steps))

    for arguments, printed in (([], "None\n400\n"), (["--steps", "3"], "('steps', 3)\n3\n")):
        assert CliRunner().invoke(command, arguments).output == printed
    assert CliRunner().invoke(command, ["--minutes", "1.5"]).output == "('minutes', 1.5)\n0\n"
    outcome = CliRunner().invoke(command, ["--steps", "3", "--minutes", "1"])
    assert outcome.exit_code == 2
    assert "expected one of --steps, --minutes, got all. Use one." in outcome.output


def test_steps_and_minutes_mean_the_same_in_python() -> None:
    assert DistillSettings().steps == 400
    assert DistillSettings(minutes=2).steps == 0
    with pytest.raises(ConfigError, match="--steps: expected it or --minutes, got both"):
        DistillSettings(steps=3, minutes=2)
    with pytest.raises(ConfigError, match="--steps: expected 1 or more, or --minutes, got 0"):
        DistillSettings(steps=0)
