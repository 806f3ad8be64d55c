"""A line of limited speed, shared by all connections."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


@dataclass
class Speed:
    """How fast bytes go through.

    Attributes:
        limit: bytes a second, of all connections together; 0 for no limit.
        free: when the line is free for the next piece; `time.monotonic`.
        lock: held while a piece takes its turn.
    """

    limit: float = 0.0
    free: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def wait(self, size: int) -> None:
        """Take the time that a piece needs, after the pieces before it."""
        if not self.limit:
            return
        with self.lock:
            self.free = max(self.free, time.monotonic()) + size / self.limit
            left = self.free - time.monotonic()
        time.sleep(max(left, 0.0))
