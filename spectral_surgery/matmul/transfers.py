"""Blocks of a matrix in host memory, moved to a device while it computes with the ones before.

Two buffers on the device take turns. A block is copied on a stream of its own; the product with it waits for the copy,
and the copy into a buffer waits for the product with the block that was there. The host waits for neither: all is
queued, so that the first blocks of the next layer cross the bus while this one computes, and a model that does not fit
the device runs as fast as its compressed bytes arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from functools import lru_cache
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

BUFFERS = 2
BUFFER_BYTES = 8 << 20  # 0.3 ms of a PCIe 4 bus: enough to hide what queueing a copy costs
STREAM_BYTES = BUFFERS * BUFFER_BYTES


class Transfers(Protocol):
    """How blocks come to a device; numbers are those of buffers."""

    def start(self, buffer: int, block: Tensor) -> None:
        """Begin to copy a block [r, bytes] of host memory, once what was computed with the buffer is done."""
        ...

    def arrived(self, buffer: int) -> Tensor:
        """The block on the device; what is queued from now on sees it whole."""
        ...

    def done(self, buffer: int) -> None:
        """Say that everything that reads the block is queued."""
        ...


class CudaTransfers:
    """Copies on a stream of their own, ordered by events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._blocks: list[Tensor] = [torch.empty(0)] * BUFFERS
        self._copied = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._free = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.int8, device=device) for _ in range(BUFFERS)]
        for buffer, free in zip(self._buffers, self._free, strict=True):
            buffer.record_stream(self._stream)  # its memory is not given to others while a copy is under way
            free.record(torch.cuda.current_stream(device))  # nor written before those who had it have finished

    def start(self, buffer: int, block: Tensor) -> None:
        """See Transfers."""
        place = self._buffers[buffer][: block.nbytes].view(block.shape)
        self._stream.wait_event(self._free[buffer])
        with torch.cuda.stream(self._stream):
            self._blocks[buffer] = place.copy_(block, non_blocking=True)
        self._copied[buffer].record(self._stream)

    def arrived(self, buffer: int) -> Tensor:
        """See Transfers."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied[buffer])
        self._buffers[buffer].record_stream(current)
        return self._blocks[buffer]

    def done(self, buffer: int) -> None:
        """See Transfers."""
        self._free[buffer].record(torch.cuda.current_stream(self._device))


class HostTransfers:
    """Nothing to move: blocks are used where they are."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = [torch.empty(0)] * BUFFERS

    def start(self, buffer: int, block: Tensor) -> None:
        """See Transfers."""
        self._blocks[buffer] = block

    def arrived(self, buffer: int) -> Tensor:
        """See Transfers."""
        return self._blocks[buffer]

    def done(self, buffer: int) -> None:
        """See Transfers."""
        self._blocks[buffer] = torch.empty(0)


class Bus:
    """What all matrices of a device share; products take turns in using it."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._turn = 0
        self._lock = Lock()

    def blocks(self, matrix: Tensor, height: int) -> Generator[tuple[int, Tensor]]:
        """The rows of a matrix on the device; a block may be read by what is queued before the next one is asked for.

        Args:
            matrix: [O, n] int8, in (pinned) host memory.
            height: rows of a block; it has BUFFER_BYTES at most.

        Yields:
            First row, and rows from there on.
        """
        waiting = deque(range(0, len(matrix), height))
        under_way: deque[tuple[int, int]] = deque()  # first row, buffer
        with self._lock:
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < BUFFERS:
                        start, buffer = waiting.popleft(), self._turn
                        self._transfers.start(buffer, matrix[start : start + height])
                        under_way.append((start, buffer))
                        self._turn = (buffer + 1) % BUFFERS  # goes on with the next matrix
                    start, buffer = under_way[0]
                    yield start, self._transfers.arrived(buffer)
                    self._transfers.done(buffer)
                    under_way.popleft()
            finally:  # whoever stops early has read what arrived
                for _, buffer in under_way:
                    self._transfers.done(buffer)


@lru_cache(maxsize=16)
def bus(device: torch.device) -> Bus:
    """The bus to a device, the same at every call."""
    with torch.inference_mode(False):
        return Bus(CudaTransfers(device) if device.type == "cuda" else HostTransfers())
