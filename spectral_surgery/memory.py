"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
WORTH_KEEPING, LITTLE = 64 << 20, 8 << 20  # bytes of a piece; the second where memory is short
_MOST = 32 << 20  # bytes of a piece, before glibc 2.35
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed_memory(piece: int = WORTH_KEEPING) -> None:
    """Ask malloc to keep pieces that are freed for whoever asks next; for processes that are ours alone.

    Pages from the system cost more than the arithmetic on them, and threads wait for each other to get them: two
    threads transform matrices 1.8 times faster so. What is kept is in the way of pieces of other sizes, though: where
    memory is short, only smaller ones should be. All threads take from one arena, since what is kept in one is not
    there for the threads of another; large pieces are asked for so rarely that threads hardly wait for it. Other
    allocators than glibc's are left alone.

    ``piece``: bytes; larger pieces go back to the system at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)
    for size in (piece, min(piece, _MOST)):
        if mallopt(_M_MMAP_THRESHOLD, size):
            mallopt(_M_TRIM_THRESHOLD, 2 * size)
            return


def release_freed_memory() -> None:
    """Give back to the system what malloc keeps; nothing with other allocators than glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_rss_bytes() -> int:
    """Largest resident size so far, in bytes, of this process or of any finished worker, whichever is larger."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if _STATUS.exists():  # Linux counts the peak of whoever started us into ru_maxrss
        return max(_status("VmHWM"), children)
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, children)


def peak_rss_growth(call: Callable[[], R]) -> tuple[R, int | None]:
    """Memory a call needs at its peak beyond what is there before it, results included.

    Linux can be asked to watch resident memory anew. What freed memory the process still holds is first given back, or
    it would hide what the call takes. Returns what the call gives, and bytes, or None where the system does not tell.
    """
    if not _RESET.exists():
        return call(), None
    release_freed_memory()
    _RESET.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
