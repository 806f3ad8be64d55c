"""What an engine is given, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from spectral_surgery.errors import SpectralSurgeryError
from spectral_surgery.files.compressed.plan import Plan, Unit
from spectral_surgery.files.compressed.units import UnitStore
from spectral_surgery.run import Run

ALL = (0, 1)  # the one share of a work that is not shared


@dataclass(frozen=True)
class Work:
    """Parts to be encoded, each into its file.

    Attributes:
        store: where the files go.
        plan: what the parts are.
        before: names of tensors whose parts are not needed any more.
        run: how the work is carried out.
        shard: which share of it is that of this process, of how many.
        last: whether this is the last work of the processes.
    """

    store: UnitStore
    plan: Plan
    before: Collection[str]
    run: Run
    shard: tuple[int, int] = ALL
    last: bool = True

    def units(self, shard: tuple[int, int] = ALL) -> list[Unit]:
        """The parts of one share, the largest first."""
        return [unit for unit in self.plan.shard(*shard) if unit.tensor.info.name not in self.before]


Sums = dict[str, Tensor]


class Share(Protocol):
    """A share of the samples of a calibration. It goes to another machine as it was made, and is begun anew there."""

    @property
    def memory(self) -> int:
        """Bytes that it takes."""

    def sums(self, changes: Sequence[Callable[[], Any]]) -> Sums:
        """Its part of the next sums. ``changes``: what was made of all sums before, in their order."""


class Others(Protocol):
    """The shares that are elsewhere."""

    def total(self, sums: Sums) -> Sums:
        """Add what they have, by name."""

    def tell(self, change: Any) -> None:
        """Go on to the next sums. ``change``: what was made of the last ones."""


Calls = Sequence[Callable[[], Any]]
Split = Callable[[int], Sequence[Share]]  # a work in so many shares, or fewer


def _nothing_to_reach(_: Run) -> AbstractContextManager[object]:
    return nullcontext()


def each_here(_: Run, calls: Calls, memory: int) -> Iterator[tuple[int, Any]]:  # noqa: ARG001 - as it is
    """Call one after the other."""
    for number, call in enumerate(calls):
        try:
            yield number, call()
        except SpectralSurgeryError as error:
            yield number, error


@dataclass(frozen=True)
class Engine:
    """Who encodes the parts of a compression; the bytes are the same.

    Attributes:
        name: how users choose it.
        help: who that is.
        encode: encode the parts that are not there yet; whether those of all shares are there then.
        reached: a context in which ``encode`` may be called several times; entered before anything is written.
        each: calls functions that have nothing to do with each other, of so many bytes of memory each; gives the number
            of each and its result, or the SpectralSurgeryError that it raised, as they are finished.
        shares: who takes shares of the samples of a calibration; None when all are run here.
    """

    name: str
    help: str
    encode: Callable[[Work], bool]
    reached: Callable[[Run], AbstractContextManager[object]] = _nothing_to_reach
    each: Callable[[Run, Calls, int], Iterator[tuple[int, Any]]] = each_here
    shares: Callable[[Run, Split], AbstractContextManager[Others]] | None = None
