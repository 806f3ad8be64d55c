"""What a benchmark case is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from spectral_surgery.errors import ConfigError, SpectralSurgeryError

Row = dict[str, object]


class CheckFailedError(SpectralSurgeryError):
    """A result was wrong, so nothing about it is printed."""


@dataclass(frozen=True)
class Inputs:
    """What a case is run on; not every case takes everything.

    Attributes:
        quick: smaller inputs, or fewer rows.
        only: names of the rows to measure; empty for all.
        text: to judge on; None for text that the case finds itself.
        train_text: to calibrate and heal on; None for text that the case finds itself.
        sts: CSV of sentence pairs and scores.
        heal_minutes: time to heal for; None for no row that is healed.
        scratch: folder for models, which stay there; None for one that is removed at the end.
        model: folder of a model to be measured; None for the one that the case knows.
    """

    quick: bool = False
    only: tuple[str, ...] = ()
    text: Path | None = None
    train_text: Path | None = None
    sts: Path | None = None
    heal_minutes: float | None = None
    scratch: Path | None = None
    model: Path | None = None

    def given(self) -> list[str]:
        """Names of the fields beside quick that are set."""
        return [field.name for field in fields(self) if field.name != "quick" and getattr(self, field.name)]


@dataclass(frozen=True)
class BenchCase:
    """One benchmark.

    Attributes:
        name: how users choose it.
        help: what it measures, in one line.
        run: inputs to rows; raises CheckFailedError when a result is wrong. A row with an aim has ``target`` and
            ``met``.
        plot: (rows, file) draws them, where there is something to be drawn.
        takes: names of the inputs beside quick that it takes. A case that takes some is long: it runs where it is
            named.
        notes: what its figures have to be read with, in sentences.
    """

    name: str
    help: str
    run: Callable[[Inputs], list[Row]]
    plot: Callable[[list[Row], Path], None] | None = None
    takes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def by_size(run: Callable[[bool], list[Row]]) -> Callable[[Inputs], list[Row]]:
    """A case that takes nothing but ``quick``."""
    return lambda inputs: run(inputs.quick)


def chosen(names: Sequence[str], known: Sequence[str], quick: Sequence[str], inputs: Inputs) -> list[str]:
    """The rows to measure, in the order in which they are known.

    Args:
        names: what the user asked for; empty for everything, or for the quick ones.
        known: all names.
        quick: those measured when little time is to be taken.
        inputs: of the case.

    Raises:
        ConfigError: when a name is unknown.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"--only {name}: expected some of {', '.join(known)}, got another name.")
    wanted = names or (quick if inputs.quick else known)
    return [name for name in known if name in wanted]


def require(holds: bool, what: str) -> None:
    """Go on only with a correct result.

    Raises:
        CheckFailedError: when it is wrong.
    """
    if not holds:
        raise CheckFailedError(f"{what}; the figures of this case are not shown.")
