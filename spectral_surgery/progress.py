"""The progress callback of long-running functions."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work advances; the command line draws a bar from it."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report that ``done`` of ``total`` are finished, the last one being ``what``."""


def silent(done: int, total: int, what: str) -> None:
    """Report nothing."""
