"""Memory for large matrices, in huge pages where the system has them.

Memory that is written for the first time costs a page fault for every 4 KiB, which may take longer than to decode what
is written there. Linux takes 2 MiB at once where it is told to.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 << 20


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose values are not set. Returns the tensor; its memory is given back with it."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    whole = size // HUGE * HUGE  # a page of which little is used would be wasted
    memory = mmap.mmap(-1, -(-size // HUGE) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, 0, whole)
    return torch.frombuffer(memory, dtype=dtype, count=count).reshape(tuple(shape))
