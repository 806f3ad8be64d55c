"""A lock on a folder: shared by shards, or exclusive; released when the process ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectral_surgery.errors import CheckpointError

LOCK_FILE = "lock"
VERSION_FILE = "source.version"  # of a source that is elsewhere
NO_WORK = (LOCK_FILE, VERSION_FILE)  # files in a folder of unfinished work that are none


@contextmanager
def hold(folder: Path, *, exclusive: bool, wait: bool) -> Iterator[None]:
    """Hold a folder while working in it.

    Args:
        folder: where; when it is gone, somebody else has finished the work and nothing is held.
        exclusive: alone, or together with others that do not ask for it alone.
        wait: wait for others, or give up at once.

    Raises:
        CheckpointError: when others hold it and ``wait`` is false.
    """
    try:
        lock = (folder / LOCK_FILE).open("ab")
    except FileNotFoundError:
        yield
        return
    with lock:
        mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(lock, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder.name}: expected one process at a time, got another that is working in it. Wait for it, or"
                " choose another output folder."
            ) from None
        yield
