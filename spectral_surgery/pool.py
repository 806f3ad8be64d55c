"""Processes that share a list of work: each takes the next item when it is free, so nobody waits for a slow one.

A team can be made before its work is known, and before the caller imports torch: the others import in the meantime.
What is taken is counted in a file, whose lock the system gives back when a process is killed.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

from spectral_surgery.ahead import ahead
from spectral_surgery.errors import CheckpointError
from spectral_surgery.memory import keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")

_ALL = (1 << 62).to_bytes(8, "little")  # items taken, when nobody is to take another one


def _as_it_is(item: Any) -> Any:
    return item


@dataclass(frozen=True)
class Team:
    """The calling process and its helpers.

    Attributes:
        size: processes, the calling one counted.
        pool: of the others; None when there are none.
        taken: file with the number of items that somebody has taken.
    """

    size: int
    pool: ProcessPoolExecutor | None
    taken: Path

    def share(
        self,
        work: Callable[[R], object],
        items: Sequence[T],
        *,
        prepare: Callable[[T], R] = _as_it_is,
        depth: int = 0,
        last: bool = False,
    ) -> Iterator[int]:
        """Do work on every item, in all processes; the caller does its part while it asks for more.

        Args:
            work: what to do with what ``prepare`` gives, able to be pickled, such as a `functools.partial`.
            items: of which every process takes the next one, from the first to the last.
            prepare: done before with an item, such as reading what is large; able to be pickled, too.
            depth: how many items each process prepares ahead of the one it works on.
            last: the others end when nothing is left to take: ending takes half a second, while the caller can go on.

        Yields:
            Numbers of the items that the calling process has done. Earlier ones are done, or others are at them.

        Raises:
            CheckpointError: when one of the processes was killed.
        """
        self.taken.write_bytes(bytes(8))
        job = _Job(self.taken, prepare, work, items, depth)
        try:
            others = [self.pool.submit(job.all) for _ in range(self.size - 1)] if self.pool else []
            if last and self.pool is not None:
                self.pool.shutdown(wait=False)
            for number in job.each():
                yield number
                for future in others:
                    if future.done():
                        future.result()  # raises what went wrong there
            for future in others:
                future.result()
        except BrokenProcessPool:
            raise CheckpointError(
                "compress: expected workers to finish, got one killed, most likely for memory; finished parts are"
                " kept. Run again with --resume and fewer --workers; a script needs `if __name__ == '__main__':`."
            ) from None

    def stop(self) -> None:
        """Let everybody finish what they are at, and take nothing more."""
        with self.taken.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(_ALL)


@contextmanager
def team(size: int, *, loads: str = "spectral_surgery.files.compressed.units") -> Iterator[Team]:
    """Start processes; they end with the block. ``loads``: a module that the others import at once."""
    with tempfile.TemporaryDirectory(prefix="spectral-surgery-") as folder:
        taken = Path(folder) / "taken"
        taken.write_bytes(bytes(8))
        pool = _pool(size - 1, loads) if size > 1 else None
        team = Team(size, pool, taken)
        try:
            yield team
        finally:
            team.stop()
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)


def _pool(size: int, loads: str) -> ProcessPoolExecutor:
    # spawn: forking a process that runs torch threads may deadlock
    pool = ProcessPoolExecutor(size, mp_context=get_context("spawn"), initializer=_start, initargs=(loads,))
    for _ in range(size):
        pool.submit(_nothing)  # starts a process
    return pool


def _start(loads: str) -> None:
    parent = parent_process()
    if parent is not None:
        Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    keep_freed_memory()
    import_module(loads)


def _end_with(sentinel: int) -> None:
    """End when the process that started us does, should it be killed: nobody waits for what we do."""
    wait([sentinel])
    os._exit(1)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Job(Generic[T, R]):
    """What one process does of a shared work."""

    taken: Path
    prepare: Callable[[T], R]
    work: Callable[[R], object]
    items: Sequence[T]
    depth: int

    def each(self) -> Iterator[int]:
        """Do the items that nobody else takes; their numbers."""
        for number, prepared in ahead(lambda number: self.prepare(self.items[number]), self._remaining(), self.depth):
            self.work(prepared)
            yield number

    def all(self) -> None:
        deque(self.each(), maxlen=0)

    def _remaining(self) -> Iterator[int]:
        while (number := _take(self.taken)) < len(self.items):
            yield number


def _take(taken: Path) -> int:
    with taken.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        number = int.from_bytes(file.read(8), "little")
        file.seek(0)
        file.write((number + 1).to_bytes(8, "little"))
    return number
