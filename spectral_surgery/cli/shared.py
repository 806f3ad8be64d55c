"""Options and arguments that several commands take."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from spectral_surgery.hub import Found

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


@dataclass(frozen=True)
class HubAccess:
    """What the options about the Hub say.

    Attributes:
        revision: branch, tag or commit.
        token: access token, None for the one that is logged in.
        push: repository to push the result to.
        private: whether that one is private, should it be new.
    """

    revision: str | None
    token: str | None
    push: str | None
    private: bool = False

    def resolve(self, source: str) -> tuple[Path, str | None]:
        """Fetch a source where need be: its path, and the repository it comes from."""
        from spectral_surgery import hub

        repository = hub.remote(source)
        path = hub.resolve(source, revision=self.revision, token=self.token)
        return path, repository.name if repository else None

    def others(self) -> HubAccess:
        """Access to the sources of a command that --revision does not mean."""
        return replace(self, revision=None)

    def base(self) -> tuple[Path | None, str | None]:
        """`resolve` for --base, which --revision does not mean; (None, None) without."""
        source = click.get_current_context().meta.get(f"{__name__}.base")
        return self.others().resolve(source) if source else (None, None)

    def outline(self, source: str) -> AbstractContextManager[Found]:
        """A source to read headers of."""
        from spectral_surgery import hub

        return hub.outline(source, revision=self.revision, token=self.token)

    def prepare(self) -> HubAccess:
        """Find out before the work whether its result can be pushed; creates the repository. Gives itself back."""
        if self.push:
            from spectral_surgery import hub

            hub.prepare(hub.to_push(self.push), private=self.private, token=self.token)
        return self

    def pushed(self, out: Path) -> dict[str, object]:
        """Push the result of a command; what --json adds, empty when nothing was asked."""
        if not self.push:
            return {}
        from spectral_surgery.commands.push import push

        report = push(out, self.push, token=self.token)
        click.echo(f"Pushed: {report.url}", err=True)
        return {"pushed": report.to_json()}


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    ctx.meta[f"{__name__}.{parameter.name}"] = value


def base_option(text: str) -> Callable[[F], F]:
    """--base: a second checkpoint; `HubAccess.base` has it."""
    return click.option("--base", expose_value=False, callback=_remember, metavar="BASE", help=text)


def hub_options(function: F) -> F:
    """Where a repository is read: --revision and --token; `hub_access` has them."""
    function = click.option(
        "--token",
        expose_value=False,
        callback=_remember,
        metavar="TOKEN",
        help="Access token for the Hub; HF_TOKEN keeps it out of the list of processes.",
    )(function)
    return click.option(
        "--revision", expose_value=False, callback=_remember, help="Branch, tag or commit of a Hub repository."
    )(function)


def push_option(function: F) -> F:
    """--push and --private: what becomes of the folder a command has made; `hub_access` has them."""
    function = click.option(
        "--private",
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="With --push: make the repository private, should it be new.",
    )(function)
    return click.option(
        "--push",
        expose_value=False,
        callback=_remember,
        metavar="REPO",
        help="Then push OUT to this repository on the Hub.",
    )(function)


def hub_access(*, quiet: bool) -> HubAccess:
    """The options of the running command about the Hub."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    meta = click.get_current_context().meta
    revision, token, push, private = (meta.get(f"{__name__}.{n}") for n in ("revision", "token", "push", "private"))
    if private and not push:
        raise click.UsageError("--private: says how --push makes a repository; it is accepted with that alone.")
    return HubAccess(revision, token, push, bool(private))


def trust_option(function: F) -> F:
    """--trust-remote-code: whether a model's own code may run; `trusted` has it."""
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="Run the code that a model brings along (auto_map in config.json); read it first.",
    )(function)


def trusted() -> bool:
    """Whether the running command was given --trust-remote-code."""
    return bool(click.get_current_context().meta.get(f"{__name__}.trust_remote_code"))


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
