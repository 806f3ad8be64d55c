"""What is made ahead is what would be made when asked for, in any order."""

from __future__ import annotations

import threading

import pytest

from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.quantizer.prefetch import Ahead


@pytest.mark.parametrize("order", ["abcdefgh", "hgfedcba", "acegxbdfh"])
def test_each_is_made_once_in_whatever_order_it_is_taken(order: str) -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name.upper()

    ahead = Ahead(make, "abcdefgh", 2)
    assert [ahead.take(name) for name in order] == list(order.upper())
    ahead.close()
    assert sorted(made) == sorted(order)


def test_only_a_few_are_made_ahead() -> None:
    made: list[str] = []
    done = threading.Semaphore(0)

    def make(name: str) -> str:
        made.append(name)
        done.release()
        return name

    ahead = Ahead(make, "abcdefghijkl", 2)
    for _ in range(4):
        assert done.acquire(timeout=10)  # before any is asked for
    ahead.take("a")
    assert done.acquire(timeout=10)
    ahead.close()
    assert sorted(made) == list("abcde")


def test_errors_come_when_they_are_asked_for() -> None:
    def make(name: str) -> str:
        if name == "b":
            raise ConfigError("b: is wrong; a is accepted.")
        return name

    ahead = Ahead(make, "abc", 1)
    assert ahead.take("a") == "a"
    with pytest.raises(ConfigError, match="b: is wrong"):
        ahead.take("b")
    assert ahead.take("c") == "c"
    ahead.close()
