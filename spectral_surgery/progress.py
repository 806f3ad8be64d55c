"""How long work tells the caller where it is, without knowing about terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Protocol

from spectral_surgery.files.writer import Entry


class Progress(Protocol):
    """Called as work advances; the command line draws a bar from it."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report that ``done`` of ``total`` are finished, the last one being ``what``."""


def silent(done: int, total: int, what: str) -> None:
    """Report nothing."""


def told(entries: Sequence[Entry], progress: Progress) -> list[Entry]:
    """The same entries; each is reported when it was written."""
    places = count(1)

    def entry(own: Entry) -> Entry:
        def chunks() -> Iterable[bytes | bytearray | memoryview]:
            yield from own.chunks()
            progress(next(places), len(entries), own.name)

        return replace(own, chunks=chunks)

    return [entry(own) for own in entries]
