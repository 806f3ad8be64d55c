"""Timing on a noisy machine: every provider in turn, many rounds, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider: median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def interleaved(providers: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time several providers in turn, after one call each to warm up.

    Args:
        providers: what to call, by name.
        rounds: calls of each, at least 2.

    Returns:
        Timings by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for call in range(rounds + 1):
        for name, provider in providers.items():
            started = time.perf_counter()
            provider()
            if call:
                seconds[name].append(time.perf_counter() - started)
    timings = {}
    for name, values in seconds.items():
        cuts = quantiles(values, n=5, method="inclusive")
        timings[name] = Timing(median(values), cuts[0], cuts[-1])
    return timings
