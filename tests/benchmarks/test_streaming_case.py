"""bench streaming: its rows on tiny checkpoints, and that each can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.case import CheckFailedError
from benchmarks.cases import streaming as case
from tests.hub_server import TOKEN, serving
from tests.hub_server.client import running

TINY = case.Sizes(3_000_000, 3, 1_500_000)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[case.Bench]:
    scratch = tmp_path_factory.mktemp("bench")
    with (
        serving(scratch / "objects") as hub,
        running(scratch / "client", hub.endpoint, {"HF_TOKEN": TOKEN}) as client,
    ):
        yield case.Bench(hub, client, scratch)


@pytest.mark.slow
def test_rows(bench: case.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "MOVED", 1.2)  # headers are a large share of so little
    rows = {str(row["what"]): row for row in case.timed(bench, TINY)}
    assert rows["bytes moved over those of the tensors"]["met"]
    assert rows["MB of disk used beyond OUT"]["met"]
    assert float(str(rows["seconds, from the Hub"]["found"])) > 0
    bench.hub.speed.limit = 1.0
    last = case.cut(bench, TINY)
    assert (last["met"], last["found"]) == (True, 0)
    assert bench.hub.speed.limit == 0


def test_wrong_bytes_show_no_figures(bench: case.Bench, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a").write_bytes(b"same")
        (folder / "README.md").write_text(folder.name)
    case._require_equal(one, other)
    (other / "a").write_bytes(b"Same")
    with pytest.raises(CheckFailedError, match="the result from the Hub is not that from disk"):
        case._require_equal(one, other)
    (other / "b").touch()
    with pytest.raises(CheckFailedError, match="a file is missing, or one too many"):
        case._require_equal(one, other)
    assert bench.scratch.is_dir()


def test_the_disk_is_watched(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"x" * 100_000)
    (tmp_path / "not").mkdir()
    with case.watched(tmp_path, (tmp_path / "not",)) as used:
        for name in ("a", "not/b"):
            (tmp_path / name).write_bytes(b"x" * 1_000_000)
        while max(used) < 1_000_000:
            pass
        (tmp_path / "a").unlink()
    assert 1_000_000 <= max(used) < 1_100_000
