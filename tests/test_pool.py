"""Teams: every item is done once, by whoever is free; errors of others come back."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from spectral_surgery.pool import team


def note(folder: Path, item: int) -> None:
    (folder / f"{item}-{os.getpid()}").touch()


def fail(here: int, item: int) -> None:
    if os.getpid() != here:
        raise ValueError(f"item {item} is bad")


@pytest.mark.parametrize("size", [1, 3])
def test_every_item_is_done_once(tmp_path: Path, size: int) -> None:
    with team(size, loads="json") as own:
        for lap in range(2):  # a team works more than once
            folder = tmp_path / str(lap)
            folder.mkdir()
            mine = list(own.share(partial(note, folder), range(200)))
            done = sorted(path.name.split("-") for path in folder.iterdir())
            assert sorted(int(item) for item, _ in done) == list(range(200))
            assert sorted(int(item) for item, who in done if int(who) == os.getpid()) == mine
            assert size > 1 or len(mine) == 200
    assert not own.taken.exists()


def test_nothing_to_do() -> None:
    with team(1) as own:
        assert list(own.share(str, [])) == []


def test_an_error_of_another_process_comes_back() -> None:
    with team(2, loads="json") as own, pytest.raises(ValueError, match=r"item [0-9]+ is bad"):
        for _ in own.share(partial(fail, os.getpid()), range(10**7)):
            pass


def test_a_stopped_team_takes_nothing_more() -> None:
    with team(1) as own:
        done = []
        for number in own.share(str, range(100)):
            done.append(number)
            if number == 4:
                own.stop()
    assert done == [0, 1, 2, 3, 4]


def tenfold(item: int) -> str:
    return str(10 * item)


def note_text(folder: Path, text: str) -> None:
    (folder / text).touch()


@pytest.mark.parametrize(("size", "depth"), [(1, 2), (2, 3)])
def test_items_are_prepared_ahead(tmp_path: Path, size: int, depth: int) -> None:
    with team(size, loads="json") as own:
        mine = list(own.share(partial(note_text, tmp_path), range(50), prepare=tenfold, depth=depth))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [10 * item for item in range(50)]
    assert mine == sorted(mine)
