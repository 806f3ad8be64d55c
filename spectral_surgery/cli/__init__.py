"""The command line: one file per command, loaded when it is called, and one place where errors become exit codes."""

from __future__ import annotations

import importlib
import sys

import click

from spectral_surgery import __version__
from spectral_surgery.errors import SpectralSurgeryError

INTERRUPTED = 130
_COMMANDS = (
    "inspect",
    "compress",
    "decompress",
    "heal",
    "merge",
    "unmerge",
    "train",
    "eval",
    "report",
    "extract",
    "export",
    "inject",
    "swap",
    "push",
    "pull",
    "generate",
    "methods",
    "completion",
)


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as click calls it
        if cmd_name not in _COMMANDS:
            return None
        return _load("merge", "unmerge") if cmd_name == "unmerge" else _load(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name == "train" and any(arg.partition("=")[0] == "--init" for arg in rest):
            command = _load("train", "from_scratch")  # no model to start from, hence other arguments and options
        return name, command, rest


def _load(module: str, name: str = "command") -> click.Command:
    command: click.Command = getattr(importlib.import_module(f"spectral_surgery.cli.{module}"), name)
    return command


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "SPECTRAL_SURGERY"}
)
@click.version_option(__version__, prog_name="spectral-surgery")
def cli() -> None:
    """Compress and inspect Hugging Face checkpoints in the frequency domain.

    Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check did not
    pass, 130 interrupted. Every option can be set by an environment variable: SPECTRAL_SURGERY_COMPRESS_BITS=4.

    \b
    Example:
      spectral-surgery compress ./model ./model-4bit --bits 4
    """


def main() -> None:
    """Run the command line."""
    run(cli)


def run(command: click.Command) -> None:
    """Run a command; deliberate errors become one line, anything else is a bug and keeps its traceback."""
    try:
        code = command.main(standalone_mode=False)
    except SpectralSurgeryError as error:
        click.echo(f"Error: {error}", err=True)
        code = 1
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Finished parts of a compression are kept: run it again with --resume.", err=True)
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, which is its right
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
