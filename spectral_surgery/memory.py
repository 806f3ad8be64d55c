"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """Largest resident size so far, in bytes, of this process or of any finished worker, whichever is larger."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max(_own_peak(), children)


def _own_peak() -> int:
    if _STATUS.exists():  # Linux counts the peak of whoever started us into ru_maxrss
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
