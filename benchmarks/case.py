"""What a benchmark case is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spectral_surgery.errors import SpectralSurgeryError

Row = dict[str, object]


class CheckFailedError(SpectralSurgeryError):
    """A result was wrong, so nothing about it is printed."""


@dataclass(frozen=True)
class BenchCase:
    """One benchmark.

    Attributes:
        name: how users choose it.
        help: what it measures, in one line.
        run: (quick) to rows; raises CheckFailedError when a result is wrong. A row with an aim has ``target`` and
            ``met``.
        plot: (rows, file) draws them, where there is something to be drawn.
    """

    name: str
    help: str
    run: Callable[[bool], list[Row]]
    plot: Callable[[list[Row], Path], None] | None = None


def require(holds: bool, what: str) -> None:
    """Go on only with a correct result.

    Raises:
        CheckFailedError: when it is wrong.
    """
    if not holds:
        raise CheckFailedError(f"{what}; the figures of this case are not shown.")
