"""What is made ahead is what would be made when asked for, in any order."""

from __future__ import annotations

import threading

import pytest

from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.quantizer.prefetch import Prefetcher


@pytest.mark.parametrize("order", ["abcdefgh", "hgfedcba", "acegxbdfh"])
def test_each_is_made_once_in_whatever_order_it_is_taken(order: str) -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name.upper()

    prefetcher = Prefetcher(make, "abcdefgh", 2)
    assert [prefetcher.take(name) for name in order] == list(order.upper())
    prefetcher.close()
    assert sorted(made) == sorted(order)


def test_only_a_few_are_made_ahead() -> None:
    made: list[str] = []
    done = threading.Semaphore(0)

    def make(name: str) -> str:
        made.append(name)
        done.release()
        return name

    prefetcher = Prefetcher(make, "abcdefghijkl", 2)
    for _ in range(4):
        assert done.acquire(timeout=10)  # before any is asked for
    prefetcher.take("a")
    assert done.acquire(timeout=10)
    prefetcher.close()
    assert sorted(made) == list("abcde")


def test_errors_come_when_they_are_asked_for() -> None:
    def make(name: str) -> str:
        if name == "b":
            raise ConfigError("b: is wrong; expected a.")
        return name

    prefetcher = Prefetcher(make, "abc", 1)
    assert prefetcher.take("a") == "a"
    with pytest.raises(ConfigError, match="b: is wrong"):
        prefetcher.take("b")
    assert prefetcher.take("c") == "c"
    prefetcher.close()
