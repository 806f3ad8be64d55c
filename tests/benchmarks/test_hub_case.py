"""bench hub: its rows on tiny checkpoints, and that each can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.case import CheckFailedError
from benchmarks.cases import hub as case
from tests.hub_server import TOKEN, serving
from tests.hub_server.client import running

TINY = case.Sizes(400_000, 400_000, 4, 2_000_000, 30_000_000)


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
    monkeypatch.setattr(case, "CUTS", 3)
    rows = [case.round_trip(bench, TINY), case.cut_upload(bench, TINY)]
    monkeypatch.setattr(case, "LIMIT", 100_000)  # far less than the weights
    rows += [case.unchanged_push(bench, TINY), case.remote_headers(bench, TINY), case.token(bench)]
    assert [row["met"] for row in rows] == [True] * 5
    assert len({tuple(row) for row in rows}) == 1  # one table
    assert "0 lost, 0 doubled" in str(rows[1]["found"])
    assert not (bench.scratch / "unchanged").exists()
    assert not (bench.scratch / "remote").exists()
    said = bench.scratch / "token" / "said.log"
    said.write_text(f"x{TOKEN}y" * 2)
    bench.said.append(TOKEN)
    for name in ("out", "adapter", "pulled", "plain"):
        for path in sorted((bench.scratch / "token" / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (bench.scratch / "token" / name).rmdir()
    (bench.scratch / "token" / "source").rename(bench.scratch / "before")
    leaky = case.token(bench)
    assert (leaky["met"], str(leaky["found"]).split(",")[0]) == (False, "found 3 times")


def test_wrong_bytes_show_no_figures(bench: case.Bench) -> None:
    bench.hub.fail("GET .*/resolve/.*safetensors", corrupt=True, times=-1, skip_ranges=True)
    with pytest.raises(CheckFailedError, match="does not have the hash the Hub lists"):
        case.round_trip(case.Bench(bench.hub, bench.client, bench.scratch / "wrong"), TINY)
    bench.hub.reset()


def test_a_text_across_two_pieces_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abcsecretdefsecret")
    for piece in range(1, 20):
        monkeypatch.setattr(case, "_PIECE", piece)
        assert case.occurrences(tmp_path / "file", b"secret") == 2
    (tmp_path / "other").write_bytes(b"abcsecretdefsecreT")
    assert case._same(tmp_path / "file", tmp_path / "file")
    assert not case._same(tmp_path / "file", tmp_path / "other")
