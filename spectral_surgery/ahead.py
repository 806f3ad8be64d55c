"""Results made a few ahead of whoever uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(make: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[tuple[T, R]]:
    """Each item, in order, with what a function makes of it.

    ``depth``: of how many following items it is made while one is used, each on another thread. With 0 it is
    called where the result is used. The threads end with the process: nobody waits for them after an error.
    """
    if not depth:
        yield from ((item, make(item)) for item in items)
        return
    coming: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        coming.append((item, Future()))
        Thread(target=_make, args=(make, *coming[-1]), daemon=True).start()
        if len(coming) > depth:
            first, result = coming.popleft()
            yield first, result.result()
    for item, result in coming:
        yield item, result.result()


def _make(make: Callable[[T], R], item: T, result: Future[R]) -> None:
    with _Raising(result):
        result.set_result(make(item))


@dataclass(frozen=True)
class _Raising:
    """What the block raises is raised where the result is used."""

    result: Future[Any]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self.result.set_exception(error)
        return True
