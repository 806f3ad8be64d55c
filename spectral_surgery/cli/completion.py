"""spectral-surgery completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from spectral_surgery.cli.options import Command


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes commands and options in a shell.

    \b
    Example:
      eval "$(spectral-surgery completion bash)"
    """
    from spectral_surgery.cli import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(
            f"{shell}: expected a shell that click completes for, got one that it does not know. Update click."
        )
    click.echo(kind(cli, {}, "spectral-surgery", "_SPECTRAL_SURGERY_COMPLETE").source())
