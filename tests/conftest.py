"""The same tests everywhere: one core for each process, equal random numbers, and examples that come again.

Threads of several processes of tests would wait for each other, in turns.
"""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import settings

from spectral_surgery.matmul import dispatch, few_tokens
from spectral_surgery.matmul.dispatch import Processor
from tests.support.processors import PROCESSORS, exact_int_mm, int8_saturates

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=100)
settings.register_profile("fresh", database=None, deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("fixed")  # --hypothesis-profile chooses another


def pytest_configure(config: pytest.Config) -> None:
    """Set before any test starts a thread or a process, or imports transformers."""
    modules = tempfile.TemporaryDirectory(prefix="modules-of-tests-")  # two processes would write the same files
    config.add_cleanup(modules.cleanup)
    os.environ["HF_MODULES_CACHE"] = modules.name
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Equal random numbers for every test, whatever ran before: a failure comes again."""
    torch.manual_seed(0)


@pytest.fixture(params=PROCESSORS, ids=str)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Processor:
    """Every kind of processor in turn, whichever this one is: what it lacks is computed all the same."""
    chosen: Processor = request.param
    monkeypatch.setattr(dispatch, "processor", lambda: chosen)
    if chosen.int8 and int8_saturates():
        monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
    return chosen


@pytest.fixture(params=["one call", "blocks"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products on a CPU by the kernel where it takes them, and then as if it took none."""
    if request.param == "blocks":
        monkeypatch.setattr(few_tokens, "most_tokens", lambda *_: 0)
