"""Results made ahead: in order, no more than asked, errors where they are used."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from spectral_surgery.ahead import ahead


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_every_item_in_order(depth: int) -> None:
    assert list(ahead(lambda n: n * n, range(20), depth)) == [(n, n * n) for n in range(20)]
    assert list(ahead(str, [], depth)) == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_more_are_taken_than_asked(depth: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number

    for number, _ in ahead(str, items(), depth):
        assert taken == min(20, number + 1 + depth)


def test_they_are_made_while_one_is_used() -> None:
    made = [threading.Event() for _ in range(10)]
    for number, _ in ahead(lambda n: made[n].set(), range(10), 2):
        for later in range(number, min(number + 3, 10)):
            assert made[later].wait(10)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_where_its_item_is_used(depth: int) -> None:
    used = []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - what came before it counts
        for _, value in ahead(lambda n: 6 // (3 - n), range(6), depth):
            used.append(value)
    assert used == [2, 3, 6]
