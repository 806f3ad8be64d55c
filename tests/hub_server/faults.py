"""Failures on request: a status instead of an answer, a connection that is cut, a byte that is changed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Fault:
    """A failure of the requests that match.

    Attributes:
        path: regular expression, searched in method and address, such as ``PUT /lfs``.
        status: answered instead of serving; 0 serves.
        times: how often; negative is always.
        headers: of that answer.
        cut_after: close the connection after this many bytes of the body, got or sent; 0 is before any answer.
        together: count these bytes over all matching requests, as of a line that goes dead; else of each.
        corrupt: change the first byte of the body, got or sent.
        skip_ranges: leave requests for a part of a file alone.
        on_hit: called when it happens.
        lock: held while the bytes of a line that goes dead are counted.
    """

    path: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    together: bool = False
    corrupt: bool = False
    skip_ranges: bool = False
    on_hit: Callable[[], None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def passing(self, done: int, size: int) -> int:
        """How many of the next ``size`` bytes get through after ``done``."""
        if self.cut_after is None:
            return size
        if not self.together:
            return min(size, self.cut_after - done)
        with self.lock:
            allowed = min(size, self.cut_after)
            self.cut_after -= allowed
        return allowed

    def cut(self) -> ConnectionAbortedError:
        """What to raise to close the connection; the server knows it as a client that went away."""
        if self.on_hit:
            self.on_hit()
        return ConnectionAbortedError("cut on request")


def matching(faults: Sequence[Fault], line: str, asked_range: str) -> Fault | None:
    """The first fault that a request meets; it is used up by that.

    Args:
        faults: in order.
        line: method and address.
        asked_range: the Range header, empty without.
    """
    ends_early = not asked_range.endswith("-") and bool(asked_range)
    for fault in faults:
        if fault.times and not (fault.skip_ranges and ends_early) and re.search(fault.path, line):
            fault.times -= 1
            return fault
    return None


def disturbed(pieces: Iterable[bytes], fault: Fault | None) -> Iterator[bytes]:
    """A body as it goes through a fault.

    Raises:
        ConnectionAbortedError: where the fault cuts it.
    """
    done = 0
    for piece in pieces:
        if fault is None:
            yield piece
            continue
        allowed = fault.passing(done, len(piece))
        flipped = bytes([piece[0] ^ 1]) + piece[1:] if fault.corrupt and not done and piece else piece
        yield flipped[:allowed]
        if allowed < len(piece):
            raise fault.cut()
        done += allowed
