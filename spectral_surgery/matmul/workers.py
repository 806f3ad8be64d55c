"""Blocks of rows in turn, a core working on each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from spectral_surgery.codec.parallel import one_torch_thread

Span = tuple[int, int]
_WAITING = 4  # blocks for each thread whose results may wait


def map_ordered(function: Callable[[Span], Tensor], spans: list[Span]) -> Iterator[Tensor]:
    """Results in order; while one block is multiplied, the next ones are decoded.

    Only as many blocks are in memory as torch has threads. Each runs on one of them: that costs no synchronisation
    within the many small steps of a block.
    """
    threads = min(torch.get_num_threads(), len(spans))
    if threads < 2:
        yield from map(function, spans)
        return
    pool = _pool(threads)
    with one_torch_thread():
        for first in range(0, len(spans), _WAITING * threads):
            yield from pool.map(function, spans[first : first + _WAITING * threads])


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    """The same at every product: to start threads, and what they keep for themselves, takes a quarter of one."""
    return ThreadPoolExecutor(threads, "spectral-matmul", torch.set_num_threads, (1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # where none of the threads goes on
