"""Weights are read from the Hub by ranges: nothing of them stays here, and whatever fails costs what was under way."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
import torch

from spectral_surgery.hub import failures
from tests.hub_server import LoopbackHub
from tests.hub_server.storage import blob_of
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder
from tests.support.hub_client import Client, running
from tests.support.quantised import FP8_SETTINGS, fp8, write

LARGEST = 4 * 512 * 700  # bytes of the parts that come first
A_FILE = r"org/far/model-0000.-of-00003.safetensors"
WEIGHTS = r"GET .*\.safetensors$"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, small enough to be quick and large enough that headers do not count."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": gaussian(512, 700, seed=i) for i in range(6)}
    tensors |= llama_like() | {"model.norm.weight": torch.ones(700)}
    return write_folder(tmp_path_factory.mktemp("streaming") / "source", tensors, shards=3)


@pytest.fixture(scope="module")
def expected(client: Client, folder: Path) -> dict[str, bytes]:
    """What compressing it from disk gives, without the card, which names the source."""
    client.result("compress", folder, folder.parent / "out", "--bits", "4")
    return without_card(folder.parent / "out")


def without_card(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name != "README.md"}


def weights(hub: LoopbackHub) -> list[int]:
    """Statuses of the requests for weights."""
    return [record.status for record in hub.log if re.search(WEIGHTS, record.line)]


def sent(hub: LoopbackHub) -> int:
    return sum(record.sent for record in hub.log if re.search(WEIGHTS, record.line))


def on_disk(client: Client, *names: str) -> int:
    """Bytes of repositories in the cache."""
    folders = (client.home / "hub" / f"models--org--{name}" for name in names)
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("blobs/*"))


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("workers", [1, 2])
def test_compress_leaves_nothing_of_the_source_here(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    hub.seed("org/far", folder)
    body = client.result("compress", "org/far", tmp_path / "out", "--bits", "4", "--workers", workers)
    assert without_card(tmp_path / "out") == expected
    assert set(weights(hub)) == {206}
    assert 0 < on_disk(client, "far") < 10_000
    assert sent(hub) < 1.02 * stored(folder) + 3 * (1 << 15)  # and the headers
    assert body["finished"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/far\n" in card


def test_quantised_sources_are_read_by_ranges_too(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    values, scales = fp8(gaussian(512, 384), (128, 128))
    name = "model.layers.0.mlp.up_proj.weight"
    source = write(tmp_path / "fp8", {name: values, f"{name}_scale_inv": scales}, FP8_SETTINGS)
    hub.seed("org/fp8", source)
    client.result("compress", "org/fp8", tmp_path / "far", "--bits", "4")
    assert set(weights(hub)) == {206}
    assert on_disk(client, "fp8") < 10_000
    client.result("compress", source, tmp_path / "near", "--bits", "4")
    assert without_card(tmp_path / "far") == without_card(tmp_path / "near")


def test_what_is_in_the_cache_is_read_from_there(
    hub: LoopbackHub, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.seed("org/kept", folder)
    with running(tmp_path / "client", hub.endpoint) as client:
        client.result("compress", "org/kept", tmp_path / "a", "--bits", "4", "--keep-source")
        assert 200 in weights(hub)
        assert on_disk(client, "kept") > stored(folder)
        hub.log.clear()
        client.result("compress", "org/kept", tmp_path / "b", "--bits", "4")
        assert not weights(hub)
    assert without_card(tmp_path / "a") == without_card(tmp_path / "b") == expected


@pytest.mark.parametrize("redirects", [False, True])
def test_every_command_on_tensors_reads_ranges(
    hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path, redirects: bool
) -> None:
    changed = {
        name: value + (0.01 * gaussian(*value.shape, seed=9) if "up_proj" in name else 0)
        for name, value in llama_like().items()
    }
    tuned = write_folder(tmp_path / "tuned", changed)
    client.result("compress", folder, tmp_path / "small", "--bits", "4")
    for name, source in (("far", folder), ("small", tmp_path / "small"), ("tuned", tuned)):
        hub.seed(f"org/{name}", source)
    hub.redirects = redirects
    client.result("decompress", "org/small", tmp_path / "a", "--verify")
    client.result("decompress", tmp_path / "small", tmp_path / "b")
    assert without_card(tmp_path / "a") == without_card(tmp_path / "b")
    for here, far in ((folder, "org/far"), (tmp_path / "small", "org/small")):
        one, other = client.result("eval", here, folder), client.result("eval", far, "org/far")
        assert one | {"seconds": 0} == other | {"seconds": 0}
    near, far = (client.result("inspect", source, "--spectrum") for source in (folder, "org/far"))
    assert near == far
    for base, out in (("org/far", "c"), (folder, "d")):
        client.result("compress", tuned, tmp_path / out, "--max-error", "0.2", "--base", base)
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "d" / "model.safetensors").read_bytes()
    assert set(weights(hub)) <= {206, 302}
    assert 0 < on_disk(client, "far", "tuned", "small") < 50_000


def test_merge_and_extract_read_ranges(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", llama_like(torch.float32))
    client.result("inject", base, tmp_path / "adapter", "--method", "lora", "-o", "r=2", "--target-modules", "q_proj")
    hub.seed("org/base", base)
    client.result("merge", base, tmp_path / "adapter", tmp_path / "a")
    client.result("merge", "org/base", tmp_path / "adapter", tmp_path / "b")
    assert without_card(tmp_path / "a") == without_card(tmp_path / "b")
    assert set(weights(hub)) == {206}


def test_a_cut_connection_costs_what_was_under_way(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.seed("org/far", folder)
    chance = random.Random(1)
    for number in range(10):
        hub.fail(WEIGHTS, cut_after=chance.randrange(1, 1_000_000), times=1 + number % 2)
    hub.fail(WEIGHTS, cut_after=0, times=3)
    done = client("compress", "org/far", tmp_path / "out", "--bits", "4", "--quiet", "--json")
    assert done.code == 0, done.stderr
    assert without_card(tmp_path / "out") == expected
    assert not any(fault.times for fault in hub.faults)
    assert sent(hub) < 1.3 * stored(folder)  # what had come before a cut was not asked for again


def test_a_line_that_stays_dead_is_one_line_and_resume_goes_on(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.seed("org/far", folder)
    hub.fail(WEIGHTS, cut_after=3 * stored(folder) // 4, together=True, times=-1)  # three are read at once
    done = client("compress", "org/far", tmp_path / "out", "--bits", "4", "--quiet")
    assert done.code == 1
    assert re.fullmatch(
        r"Error: org/far/model-0000.-of-00003.safetensors: cannot be reached or used \(.*\n", done.stderr
    )
    assert 60 < done.slept < 1000
    assert not (tmp_path / "out").exists()
    units = {path.name: path.read_bytes() for path in (tmp_path / "out.partial" / "units").glob("*.unit")}
    assert units
    hub.reset()
    done = client("compress", "org/far", tmp_path / "out", "--bits", "4")
    assert "out.partial: expected an empty folder, got unfinished work. Use --resume" in done.stderr
    hub.log.clear()
    client.result("compress", "org/far", tmp_path / "out", "--bits", "4", "--resume")
    assert without_card(tmp_path / "out") == expected
    left = stored(folder) - len(units) * LARGEST  # what was done is not read again
    assert sent(hub) < left + LARGEST // 4  # beside it headers, and what may be tied
    assert not (tmp_path / "out.partial").exists()


def test_resume_refuses_a_repository_that_moved_on(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    repo = hub.seed("org/far", folder)
    commit = repo.refs["main"][-1].sha
    hub.fail(WEIGHTS, cut_after=stored(folder) // 2, together=True, times=-1)
    assert client("compress", "org/far", tmp_path / "out", "--bits", "4", "--quiet").code == 1
    hub.reset()
    moved = hub.edit("org/far", "README.md", b"# New\n")
    done = client("compress", "org/far", tmp_path / "out", "--bits", "4", "--resume")
    assert done.code == 1
    assert done.stderr == (
        f"Error: org/far: has moved on since this work began, from {commit[:12]} to {moved[:12]}; expected the same."
        f" Go on with --revision {commit}, or discard the work with --overwrite.\n"
    )
    client.result("compress", "org/far", tmp_path / "out", "--bits", "4", "--resume", "--revision", commit)
    assert without_card(tmp_path / "out") == expected
    client.result("compress", "org/far", tmp_path / "b", "--bits", "4")  # another commit, begun anew


def test_a_branch_that_moves_meanwhile_changes_nothing(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    repo = hub.seed("org/far", folder)

    def move() -> None:
        other = write_folder(tmp_path / "other", {"x.weight": torch.ones(70, 70)})
        repo.append("main", {path.name: blob_of(path) for path in other.iterdir()})

    hub.fail(WEIGHTS, 503, on_hit=move)
    client.result("compress", "org/far", tmp_path / "out", "--bits", "4")
    assert without_card(tmp_path / "out") == expected


@pytest.mark.parametrize("longer", [False, True])
def test_a_file_that_is_replaced_meanwhile_is_refused(
    hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path, longer: bool
) -> None:
    hub.seed("org/far", folder)
    name = "model-00002-of-00003.safetensors"
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(bytes(data) + b"\0" * longer)
    reads = 0

    def replaced() -> None:
        nonlocal reads
        reads += 1
        hub.replace("org/far", name, tmp_path / name)

    hub.fail(r"GET .*model-00001-of-00003.*", 503, on_hit=replaced)
    done = client("compress", "org/far", tmp_path / "out", "--bits", "4", "--quiet")
    assert reads == 1
    assert done.code == 1
    assert f"Error: org/far/{name}: was replaced while it was read; expected the file of commit " in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_whole_files_in_place_of_parts_are_not_read(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.seed("org/proxied", folder)
    hub.ranges = False
    hub.speed.limit = 2e7  # so that little is under way when the client has seen what comes
    done = client("compress", "org/proxied", tmp_path / "out", "--bits", "4", "--quiet")
    assert done.code == 1
    assert done.stderr.startswith("Error: org/proxied/model-0000")
    assert ": is given as a whole (200), perhaps by a proxy; expected the part that was asked for (206)." in done.stderr
    assert done.stderr.endswith("Use --keep-source, which downloads whole files.\n")
    assert sent(hub) < stored(folder)
    hub.speed.limit = 0
    client.result("compress", "org/proxied", tmp_path / "kept", "--bits", "4", "--keep-source")
    assert without_card(tmp_path / "kept") == expected


def test_a_server_may_give_less_than_was_asked(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.seed("org/far", folder)
    hub.longest = 300_000
    client.result("compress", "org/far", tmp_path / "out", "--bits", "4")
    assert without_card(tmp_path / "out") == expected


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for(
    hub: LoopbackHub, client: Client, folder: Path, expected: dict[str, bytes], tmp_path: Path, status: int
) -> None:
    hub.seed("org/far", folder)
    hub.fail(WEIGHTS, status, times=2, headers={"Retry-After": "40"})
    hub.fail(WEIGHTS, 429, headers={"RateLimit": '"resolvers";r=0;t=50'})
    done = client("compress", "org/far", tmp_path / "out", "--bits", "4", "--quiet", "--json")
    assert done.code == 0, done.stderr
    assert 2 * 40 + 50 <= done.slept < 2 * 40 + 60
    assert without_card(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "the token is missing or refused (401)"),
        (403, "not permitted (403)"),
        (404, "not found (404)"),
        (416, "shorter than the Hub says (416)"),
        (429, "too many requests (429)"),
        (500, "the Hub failed (500)"),
    ],
)
def test_refusals_are_one_line_and_nothing_is_lost(
    hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path, status: int, text: str
) -> None:
    hub.seed("org/far", folder)
    hub.fail(r"GET .*model-00003-of-00003", times=1)  # the header is read, the tensors are refused
    hub.fail(r"GET .*model-00003-of-00003", status, times=-1)
    done = client("compress", "org/far", tmp_path / "out", "--bits", "4", "--quiet")
    assert done.code == 1
    assert done.stderr.startswith("Error: org/far/model-00003-of-00003.safetensors: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    hub.reset()
    client.result("compress", "org/far", tmp_path / "out", "--bits", "4", "--resume")


def test_text_needs_the_source_here(hub: LoopbackHub, client: Client, folder: Path, tmp_path: Path) -> None:
    hub.seed("org/read", folder)
    (tmp_path / "text.txt").write_text("some words\n" * 50)
    client("compress", "org/read", tmp_path / "out", "--bits", "4", "--calibrate", tmp_path / "text.txt")
    assert 200 in weights(hub)  # downloaded whole, as it is read several times


class _AnsweredError(Exception):
    def __init__(self, status: int, headers: dict[str, str]) -> None:
        super().__init__(status)
        self.response = type("Response", (), {"status_code": status, "headers": headers})()


@pytest.mark.parametrize(
    ("error", "attempt", "seconds"),
    [
        (_AnsweredError(429, {"Retry-After": "7"}), 1, 7.0),
        (_AnsweredError(429, {"Retry-After": "99999"}), 1, 300.0),
        (_AnsweredError(429, {"RateLimit": '"api";r=0;t=55'}), 1, 55.0),
        (_AnsweredError(429, {"RateLimit": '"api";r=9;t=55'}), 3, 8.0),
        (_AnsweredError(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), 2, 4.0),
        (OSError("no answer"), 2, 4.0),
    ],
)
def test_how_long_is_waited(error: Exception, attempt: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    failures.pause(error, attempt, 4)
    assert waits == [seconds]
    with pytest.raises(type(error)):
        failures.pause(error, 4, 4)


def test_what_does_not_pass_is_raised() -> None:
    with pytest.raises(_AnsweredError):
        failures.pause(_AnsweredError(404, {}), 1, 4)
