"""Matrices are made before they are asked for: all cores decode while transformers goes from one to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Prefetcher(Generic[K, T]):
    """Results of a function by name, a few of them computed ahead in the order that is expected.

    What is made ahead would be made anyway, so that nothing but what is under way takes additional memory.
    """

    def __init__(self, make: Callable[[K], T], names: Iterable[K], threads: int) -> None:
        """Begin.

        Args:
            make: called once for each name, on one thread.
            threads: calls at once.
        """
        self._make = make
        self._expected = deque(names)
        self._depth = 2 * threads
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._ready: dict[K, Future[T]] = {}
        self._prepare()

    def take(self, name: K) -> T:
        """The result for a name, whether it was expected now, later or never.

        Raises Exception whatever the function raised.
        """
        future = self._ready.pop(name, None)
        if future is None:
            if name in self._expected:
                self._expected.remove(name)
            future = self._pool.submit(self._make, name)
        self._prepare()
        return future.result()

    def _prepare(self) -> None:
        while self._expected and len(self._ready) < self._depth:
            following = self._expected.popleft()
            self._ready[following] = self._pool.submit(self._make, following)

    def close(self) -> None:
        """Give up what was not taken."""
        self._expected.clear()
        self._ready.clear()
        self._pool.shutdown(cancel_futures=True)
