"""Peak memory of one call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectral_surgery.memory import peak_rss_growth


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Memory a call needs at its peak beyond what is there before it, results included.

    On a GPU that is what the allocator hands out; else resident memory of this process.

    Args:
        call: to be measured; call it once before, so that it is warm.
        device: where it computes.

    Returns:
        Bytes, or None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    return peak_rss_growth(call)[1]
