"""Options and arguments that several commands take."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spectral_surgery.cli.options import F, from_options, options_of
from spectral_surgery.run import Run

if TYPE_CHECKING:
    from spectral_surgery.files.storage import Checkpoint

CHECK_FAILED = 3
_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


@dataclass(frozen=True)
class HubAccess:
    """What the options about the Hub say."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub repository."})
    token: str | None = field(
        default=None,
        metadata={
            "help": "Access token for the Hub; HF_TOKEN keeps it out of the list of processes.",
            "metavar": "TOKEN",
        },
    )
    push: str | None = field(
        default=None, metadata={"help": "Then push OUT to this repository on the Hub.", "metavar": "REPO"}
    )
    private: bool = field(
        default=False, metadata={"help": "With --push: make the repository private, should it be new."}
    )
    stream_push: int | None = field(
        default=None,
        metadata={
            "help": "With --push: upload and remove weight files of this size as they are finished; OUT gets the rest.",
            "bytes": True,
            "metavar": "SIZE",
        },
    )
    keep_source: bool = field(
        default=False,
        metadata={"help": "Download what is on the Hub into the cache, instead of reading the weights from there."},
    )
    allow_bin: bool = field(
        default=False,
        metadata={
            "help": "Read PyTorch's .bin files where there are no safetensors: tensors and nothing else are taken from"
            " them."
        },
    )

    def resolve(self, source: str) -> tuple[Path, str | None]:
        """Fetch a source where need be: its path, and the repository it comes from."""
        from spectral_surgery import hub

        repository = hub.remote(source)
        path = hub.resolve(source, revision=self.revision, token=self.token)
        return path, repository.name if repository else None

    def others(self) -> HubAccess:
        """Access to the sources of a command that --revision does not mean."""
        return replace(self, revision=None)

    def locate(self, source: str, *, headers: bool = False) -> tuple[Checkpoint, str | None]:
        """Find a source, of which headers alone may be wanted, and the repository it is in; weights stay there."""
        from spectral_surgery import hub

        repository = hub.remote(source)
        found: Checkpoint | None = None
        if self.allow_bin or source.lower().endswith(".gguf"):
            found = hub.fetch_foreign(source, revision=self.revision, token=self.token, pickled=self.allow_bin)
        if found is None and self.keep_source and not headers:
            found = hub.resolve(source, revision=self.revision, token=self.token)
        if found is None:
            found = hub.locate(source, revision=self.revision, token=self.token, companions=not headers)
        opened = self._opened(found) if isinstance(found, Path) else found
        return opened, repository.name if repository else None

    def _opened(self, path: Path) -> Checkpoint:
        """A local checkpoint, in whatever kind of files it is."""
        from spectral_surgery.files.pickled import find_pickled, holds_pickled

        if self.allow_bin and holds_pickled(path):
            return find_pickled(path)
        if path.suffix.lower() != ".gguf" or not path.is_file():
            return path
        from spectral_surgery.hf.gguf_source import find_gguf

        made = click.get_current_context().with_resource(tempfile.TemporaryDirectory(prefix="spectral-surgery-"))
        return find_gguf(path, Path(made))

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


def hub_access() -> HubAccess:
    """The options of the running command about the Hub."""
    params = click.get_current_context().params
    if params.get("quiet", params["as_json"]) or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    access = from_options(HubAccess)
    if access.private and not access.push:
        raise click.UsageError("--private: expected with --push, got it alone. It says how --push makes a repository.")
    if access.stream_push and not access.push:
        raise click.UsageError("--stream-push: expected with --push, got it alone. It says how --push uploads.")
    return access


source_argument = click.argument("source", metavar="SOURCE")
out_argument = click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
hub_options = options_of(HubAccess, "revision", "token")
reading_options = options_of(HubAccess, "keep_source", "allow_bin")
stream_push_option = options_of(HubAccess, "stream_push")
push_options = options_of(HubAccess, "push", "private")
overwrite_option = options_of(Run, "overwrite")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Threads of each process.  [default: all cores, shared by the processes]"
)


def all_of(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several decorators as one; the first is the outermost."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


output_options = all_of(quiet_option, json_option)
resume_training_options = all_of(
    click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT."),
    click.option("--overwrite", is_flag=True, help="Discard what is in OUT."),
)
writing_options = all_of(hub_options, push_options, overwrite_option, dry_run_option, output_options)


def threads_or_all(threads: int | None = None, workers: int = 1) -> int:
    """The threads asked for, or an equal share of the cores."""
    threads = threads or click.get_current_context().params["threads"]
    return threads or max(1, len(os.sched_getaffinity(0)) // workers)


def ray_address() -> str | None:
    """Where the cluster of --engine ray is; None for here.

    Raises:
        click.UsageError: when an address is given for another engine.
    """
    params = click.get_current_context().params
    if params["engine"] != "ray" and params["ray_address"]:
        raise click.UsageError("--ray-address: expected with --engine ray, got it alone.")
    if params["engine"] == "ray":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # where Ray is started here, it would report on it
    given: str | None = params["ray_address"]
    return given or os.environ.get("RAY_ADDRESS")


def apart_from_ray(engine: str | None) -> AbstractContextManager[object]:
    """What Ray prints to stdout meanwhile, such as that a node is lost, goes to stderr: stdout is for the result."""
    return redirect_stdout(sys.stderr) if engine == "ray" else nullcontext()


def shard_of(text: str | None) -> tuple[int, int]:
    """Which part of the work is ours: (index, count), (0, 1) when nobody says otherwise.

    Args:
        text: ``i/n`` from --shard; None asks torchrun's or Slurm's variables.

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
        raise click.BadParameter(f"expected i/n with i below n, such as 0/4, got '{text}'.", param_hint="--shard")
    return int(index), int(count)


def is_first() -> bool:
    """Whether this is the process that writes, of those that a launcher has started."""
    return shard_of(None)[0] == 0
