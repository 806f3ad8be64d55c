"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import resource


def peak_rss_bytes() -> int:
    """Largest resident size so far, in bytes, of this process or of any finished child, whichever is larger."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, children) * 1024
