"""Frames in parallel, with the same bits whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch operations on one thread, and on as many as before afterwards.

    A product split over threads may round differently, and the idle threads of torch spin: they take our cores.
    """
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def parallel_map(function: Callable[[A], B], items: Sequence[A], threads: int) -> list[B]:
    """Apply a function to every item, in order; torch and numpy release the interpreter lock, so threads suffice.

    Returns the results, in the order of the items.

    Args:
        function: what to apply; each call uses one thread.
        threads: calls at once.
    """
    with one_torch_thread():
        if threads <= 1 or len(items) <= 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
