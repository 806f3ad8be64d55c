"""How long-running work is carried out; nothing here changes its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from spectral_surgery.pool import Team
from spectral_surgery.progress import Progress, silent

EngineName = Literal["local", "torchrun", "ray"]  # rows of `engines.ENGINES`


def _unread(sentence: str) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """How long-running work is carried out.

    Processes import the calling script: it needs a ``__main__`` guard. Instead of their number there may be a team of
    them, of which this is the last work.
    """

    workers: int | Team = field(default=1, metadata={"help": "Processes.", "least": 1})
    threads: int = field(default=1, metadata={"help": "Threads of each process.", "least": 1})
    engine: EngineName = field(
        default="local",
        metadata={
            "help": "Who encodes the parts: processes of this machine, of a launcher, or tasks on a cluster of Ray.",
            "unset": "torchrun under torchrun and srun and with --shard, else local",
        },
    )
    ray_address: str | None = field(
        default=None,
        metadata={
            "help": "Cluster of --engine ray: 10.0.0.1:6379, or auto for the one of this machine.",
            "unset": "RAY_ADDRESS, else Ray is started here",
            "metavar": "ADDRESS",
        },
    )
    parts: str | None = field(
        default=None,
        metadata={
            "help": "Place that all nodes of --engine ray write parts to, and --resume finds them at: any URL that"
            " fsspec knows, such as s3://bucket/folder.",
            "unset": "OUT's unfinished folder where a node has it, else they are sent back",
            "metavar": "URL",
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on with unfinished work of the same sources, options and text."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace OUT, and discard unfinished work."})
    origin: str | None = field(
        default=None, metadata={"help": "The Hub repository that the source is a copy of, for the model card."}
    )
    progress: Progress = field(default=silent, metadata={"help": "Called as the work advances."})
    note: Callable[[str], None] = field(
        default=_unread, metadata={"help": "Called with a sentence on what is going to come of the work."}
    )
