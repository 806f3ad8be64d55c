"""How long work is carried out; nothing here decides its result."""

from __future__ import annotations

from dataclasses import dataclass

from spectral_surgery.pool import Team
from spectral_surgery.progress import Progress, silent


@dataclass(frozen=True)
class Run:
    """How long work is carried out.

    Attributes:
        workers: processes, which import the calling script: it needs a ``__main__`` guard; or a team of them, of which
            this is the last work.
        threads: of each process.
        resume: go on with unfinished work of the same source, options and text.
        overwrite: replace an existing folder, and discard unfinished work.
        origin: the Hub repository that the source is a copy of, for the model card.
        progress: called as the work advances.
    """

    workers: int | Team = 1
    threads: int = 1
    resume: bool = False
    overwrite: bool = False
    origin: str | None = None
    progress: Progress = silent
