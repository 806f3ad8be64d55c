"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

R = TypeVar("R")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Largest resident size so far, in bytes, of this process or of any finished worker, whichever is larger."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max(_own_peak(), children)


def peak_rss_growth(call: Callable[[], R]) -> tuple[R, int | None]:
    """Memory a call needs at its peak beyond what is there before it, results included.

    Linux can be asked to watch resident memory anew. What freed memory the process still holds is first given back, or
    it would hide what the call takes.

    Args:
        call: what is measured.

    Returns:
        What the call gives, and bytes, or None where the system does not tell.
    """
    if not _RESET.exists():
        return call(), None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _RESET.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _own_peak() -> int:
    if _STATUS.exists():  # Linux counts the peak of whoever started us into ru_maxrss
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(key: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
