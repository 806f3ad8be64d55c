"""Shares of a calibration on a cluster of Ray: each sits on an actor, and their sums are added by a tree.

When a node is lost, its shares are begun anew on other actors, where they go through what was changed before, without
sums. Nothing else is done twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spectral_surgery.engines.base import Share, Split, Sums
from spectral_surgery.engines.cluster import PATIENCE, PROCESS_BYTES, TRIES, Room, calling, explained, places
from spectral_surgery.engines.part import installed
from spectral_surgery.run import Run


@contextmanager
def shares_on_ray(run: Run, split: Split) -> Iterator[Shares]:
    """Have as many shares as there are processors, while the context lasts."""
    import ray

    there = split(max(1, places(run.threads)))
    shares = Shares(run, PROCESS_BYTES + max(share.memory for share in there), [_sent(share) for share in there])
    try:
        shares.begin()
        yield shares
        ray.wait(shares.asked, num_returns=len(shares.asked), timeout=PATIENCE)  # for nothing, and soon there
    finally:
        for seat in set(shares.seats):
            ray.kill(seat)


def _sent(share: Share) -> Any:
    import ray
    from ray import cloudpickle

    return ray.put(cloudpickle.dumps(lambda: share))


@dataclass
class Shares:
    """Shares under way.

    Attributes:
        run: how the work is carried out.
        memory: bytes of a process.
        shares: references to them.
        seats: the actor of each.
        changes: references to what was told.
        asked: references to the sums of each.
    """

    run: Run
    memory: int
    shares: Sequence[Any]
    seats: list[Any] = field(default_factory=list)
    changes: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)

    def begin(self) -> None:
        """Give each share an actor of its own, and ask for the first sums."""
        self.seats = [self._seat() for _ in self.shares]
        self.asked = [self._ask(number) for number in range(len(self.shares))]

    def tell(self, change: Any) -> None:
        """Go on to the next sums, with what was made of the last ones."""
        import ray

        self.changes.append(ray.put(change))
        self.asked = [self._ask(number) for number in range(len(self.shares))]

    def total(self, sums: Sums) -> Sums:
        """These sums and those of all shares."""
        import ray

        lost, tries = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError), TRIES
        while True:
            try:
                return added_up(sums, self._wait_for(self._tree()))
            except ray.exceptions.RayError as error:
                if not (tries and isinstance(error, lost)):
                    raise explained(error, "--calibrate") from None
            tries -= 1
            self._move()

    def _seat(self) -> Any:
        import ray

        return ray.remote(_kind_of_seat()).options(num_cpus=self.run.threads, memory=self.memory).remote()

    def _ask(self, number: int) -> Any:
        return self.seats[number].sums.remote(number, installed(), self.shares[number], self.changes)

    def _tree(self) -> Any:
        """A reference to the sums of all shares; each pair is added where its first one is."""
        left = list(zip(self.seats, self.asked, strict=True))
        while len(left) > 1:
            pairs = zip(left[::2], left[1::2], strict=False)
            added = [(seat, seat.added.remote(one, other)) for (seat, one), (_, other) in pairs]
            left = added + left[2 * len(added) :]
        return left[0][1]

    def _wait_for(self, reference: Any) -> Sums:
        import ray

        room = Room(self.run)
        while not ray.wait([reference], timeout=PATIENCE)[0]:
            room.look(self.memory)
        found: Sums = ray.get(reference)
        return found

    def _move(self) -> None:
        """Begin the shares of lost actors anew on others."""
        import ray

        there = {seat for seat in self.seats if _is_there(seat)}
        for seat in {*self.seats} - there:
            ray.kill(seat)  # it may only be out of reach
        there = there or {self._seat()}
        for number, seat in enumerate(self.seats):
            if seat not in there:
                self.seats[number] = min(there, key=self.seats.count)
                self.asked[number] = self._ask(number)


def _is_there(seat: Any) -> bool:
    import ray

    try:
        ray.get(seat.answer.remote())
    except ray.exceptions.RayActorError:
        return False
    return True


def added_up(first: Sums, second: Sums) -> Sums:
    """Sums by name, of what either has; a tensor that has several names keeps them."""
    sums: dict[tuple[int | None, int | None], Tensor] = {}
    found = {}
    for name in first | second:
        there = [both[name] for both in (first, second) if name in both]
        key = id(first.get(name)), id(second.get(name))
        if key not in sums:
            sums[key] = there[0] + there[1] if len(there) > 1 else there[0]
        found[name] = sums[key]
    return found


def _kind_of_seat() -> type:
    """What shares sit on; sent as it is, see `calling`."""
    call = calling()

    class Seat:
        def __init__(self) -> None:
            self.shares: dict[int, Any] = {}

        def sums(self, number: int, version: str, share: bytes, changes: Sequence[Any]) -> Any:
            from functools import partial

            import ray

            if number not in self.shares:
                self.shares[number] = call(version, share)
            return self.shares[number].sums([partial(ray.get, change) for change in changes])

        def added(self, first: Any, second: Any) -> Any:
            from spectral_surgery.engines.shares import added_up

            return added_up(first, second)

        def answer(self) -> None:
            pass

    return Seat
