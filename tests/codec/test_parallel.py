"""Order kept, threads as before, and errors passed on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from spectral_surgery.codec.parallel import one_torch_thread, parallel_map


@pytest.fixture(autouse=True)
def two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, 1, 2, 5, 50])
def test_results_are_in_the_order_of_the_items(threads: int) -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.01 if i < 2 else 0)
        return i * i

    assert parallel_map(slow_at_first, range(12), threads) == [i * i for i in range(12)]
    assert parallel_map(slow_at_first, [], threads) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_every_call_has_one_torch_thread(threads: int) -> None:
    assert parallel_map(lambda _: torch.get_num_threads(), range(4), threads) == [1] * 4
    assert torch.get_num_threads() == 2


def test_calls_run_at_once() -> None:
    barrier = threading.Barrier(2, timeout=10)  # breaks unless both arrive
    assert len(parallel_map(lambda _: barrier.wait(), range(2), 2)) == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_comes_back_after_an_error(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda i: 1 // i, [1, 0, 2], threads)
    assert torch.get_num_threads() == 2


def test_one_torch_thread_nests() -> None:
    with one_torch_thread():
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_other_threads_keep_theirs() -> None:
    """A server computes for several at once: who takes one thread takes none from the others, MKL's neither."""

    def counts() -> tuple[int, str]:
        return torch.get_num_threads(), "".join(re.findall(r"mkl_get_max_threads.*", torch.__config__.parallel_info()))

    before, inside, looked = counts(), threading.Event(), threading.Event()

    def other() -> None:
        torch.set_num_threads(2)
        with one_torch_thread():
            inside.set()
            looked.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert inside.wait(60)
        assert counts() == before
    finally:
        looked.set()
        thread.join()
    assert counts() == before
