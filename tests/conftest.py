"""One core for each process of the tests: threads of several would wait for each other, in turns."""

from __future__ import annotations

import os

import torch


def pytest_configure() -> None:
    """Set before any test starts a thread or a process."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Equal random numbers for every test, whatever ran before: a failure comes again."""
    torch.manual_seed(0)
