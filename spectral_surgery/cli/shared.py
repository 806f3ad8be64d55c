"""Options and arguments that several commands take."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])

_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def source_argument(function: F) -> F:
    """SOURCE: a folder, a .safetensors file, or a repository on the Hub."""
    return click.argument("source", metavar="SOURCE")(function)


def out_argument(function: F) -> F:
    """OUT: the folder to create."""
    return click.argument("out", metavar="OUT", type=click.Path(path_type=Path))(function)


def output_options(function: F) -> F:
    """How results are shown: --json and --quiet."""
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="Show no progress.")(function)


def writing_options(function: F) -> F:
    """What a command that writes takes: --dry-run and --overwrite."""
    function = click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")(function)
    return click.option("--overwrite", is_flag=True, help="Replace OUT, and discard unfinished work.")(function)


def threads_option(function: F) -> F:
    """--threads: frames worked on at once by each worker."""
    return click.option(
        "--threads", type=click.IntRange(1), help="Threads of each worker  [default: all cores, shared by the workers]"
    )(function)


def threads_or_all(threads: int | None, workers: int = 1) -> int:
    """The threads asked for, or an equal share of the cores."""
    return threads or max(1, len(os.sched_getaffinity(0)) // workers)


def shard_of(text: str | None) -> tuple[int, int]:
    """Which part of the work is ours.

    Args:
        text: ``i/n`` from --shard; None asks torchrun's or Slurm's variables.

    Returns:
        (index, count); (0, 1) when nobody says otherwise.

    Raises:
        click.BadParameter: when the text is not i/n.
    """
    if text is None:
        for rank, world in _LAUNCHERS:
            if int(os.environ.get(world, "1")) > 1:
                return int(os.environ.get(rank, "0")), int(os.environ[world])
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(f"'{text}' is not i/n with i from 0 to n - 1, such as 0/4.", param_hint="--shard")
    return int(index), int(count)
