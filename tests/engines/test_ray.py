"""compress on a cluster of Ray whose nodes are processes of this machine: lost nodes, drivers and folders."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress, plan_compression
from spectral_surgery.engines import ray as engine
from spectral_surgery.engines.cluster import calling, explained
from spectral_surgery.errors import BackendError, CheckpointError, ConfigError
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.storage import RemoteCheckpoint
from spectral_surgery.hub.failures import UnansweredError
from tests.engines.nodes import NODE, another_node, on
from tests.hub_server import TOKEN, serving
from tests.hub_server.client import running
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OPTIONS = CompressOptions(Target("bits", 3.0))
PARTS = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"layers.{i}.weight": gaussian(768, 768 + 64 * (i % 3), seed=i) for i in range(PARTS)}
    return write_folder(tmp_path_factory.mktemp("source") / "model", tensors | llama_like())


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    compress(source, out, OPTIONS)
    return contents(out)


def test_the_bytes_and_the_progress_are_those_of_one_machine(
    cluster: Any, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    run = on(cluster, progress=lambda done, total, _: seen.append((done, total)))
    report = compress(source, tmp_path / "out", OPTIONS, run=run)
    assert contents(tmp_path / "out") == expected
    assert not list(tmp_path.glob("out.*"))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
    assert report.manifest.tensors
    assert not ray.is_initialized()


def test_without_a_shared_folder_the_driver_writes(
    connected: Any, source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    real = engine.replace_file

    def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
        written.append(path)
        real(path, data, durable=durable)

    monkeypatch.setattr(engine, "replace_file", replace_file)
    monkeypatch.setattr(engine, "_token", unseen)
    compress(source, tmp_path / "out", OPTIONS, run=on(connected))
    assert contents(tmp_path / "out") == expected
    assert len(written) == PARTS + 3


def test_parts_are_left_at_a_url_and_another_driver_goes_on_with_them(
    connected: Any, source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_token", unseen)
    parts, seen = tmp_path / "parts", list[int]()

    def stop(done: int, _: int, __: str) -> None:
        seen.append(done)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", OPTIONS, run=on(connected, parts=parts.as_uri(), progress=stop))
    before = {file: file.stat().st_mtime_ns for file in parts.glob("*.unit")}
    assert len(before) >= 6
    kept = {file: file.read_bytes() for file in before}
    shutil.rmtree(tmp_path / "out.partial")  # with the disk of the driver
    again: set[Path] = set()

    def look(_: int, __: int, ___: str) -> None:
        again.update(file for file, written in before.items() if file.exists() and file.stat().st_mtime_ns != written)

    compress(source, tmp_path / "out", OPTIONS, run=on(connected, parts=parts.as_uri(), resume=True, progress=look))
    assert contents(tmp_path / "out") == expected
    assert len(kept) < PARTS
    assert not again
    assert not list(parts.iterdir())


@contextmanager
def unseen(_: Path) -> Iterator[str]:
    """A token that no worker finds, as if the folder were on the driver alone."""
    yield "unseen.token"


def test_a_full_disk_of_the_driver_costs_what_is_under_way(
    connected: Any, source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = engine.replace_file, iter(range(100))

    def full(path: Path, data: bytes, *, durable: bool = True) -> None:
        if next(calls) == 3:
            with engine.writing_to(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, durable=durable)

    monkeypatch.setattr(engine, "replace_file", full)
    monkeypatch.setattr(engine, "_token", unseen)
    with pytest.raises(CheckpointError, match="expected room for the output, got a full disk"):
        compress(source, tmp_path / "out", OPTIONS, run=on(connected))
    assert len(list((tmp_path / "out.partial" / "units").glob("*.unit"))) == 3
    compress(source, tmp_path / "out", OPTIONS, run=on(connected, resume=True))
    assert contents(tmp_path / "out") == expected


def test_a_node_is_lost_at_a_random_moment_twice(
    connected: Any, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random(0)
    with another_node(connected) as third, another_node(connected) as fourth:
        moments = {chance.randrange(2, PARTS // 2): third, chance.randrange(PARTS // 2, PARTS - 2): fourth}
        lost, finished = [], 0

        def lose(_: int, __: int, ___: str) -> None:
            nonlocal finished
            finished += 1
            if finished in moments:
                node = moments[finished]
                lost.append(threading.Timer(chance.uniform(0, 0.3), connected.remove_node, (node, False)))
                lost[-1].start()

        compress(source, tmp_path / "out", OPTIONS, run=on(connected, progress=lose))
        for timer in lost:
            timer.join()
    assert len(lost) == 2
    assert contents(tmp_path / "out") == expected


def test_a_driver_that_was_killed_is_gone_on_with(
    connected: Any, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, units = tmp_path / "out", tmp_path / "out.partial" / "units"
    command = [sys.executable, "-m", "spectral_surgery", "compress", str(source), str(out), "--bits", "3", "--quiet"]
    with subprocess.Popen([*command, "--engine", "ray", "--ray-address", connected.address]) as driver:
        while driver.poll() is None and len(list(units.glob("*.unit"))) < 5:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in units.glob("*.unit")}
    again: set[Path] = set()

    def look(_: int, __: int, ___: str) -> None:
        again.update(path for path, written in before.items() if path.stat().st_mtime_ns != written)

    compress(source, out, OPTIONS, run=on(connected, resume=True, progress=look))
    assert contents(out) == expected
    assert 5 <= len(before) < PARTS
    assert not again


def test_an_interrupted_driver_cancels_its_tasks(connected: Any, source: Path, tmp_path: Path) -> None:
    def interrupt(_: int, __: int, ___: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", OPTIONS, run=on(connected, progress=interrupt))
    assert ray.is_initialized()  # the caller's
    units = tmp_path / "out.partial" / "units"
    assert not list(units.glob("*.token"))
    # tasks that are asked for now run when those are gone
    ray.get([ray.remote(lambda: None).options(num_cpus=1).remote() for _ in range(4)])
    time.sleep(1)
    assert len(list(units.glob("*.unit"))) <= 3


def test_what_is_wrong_with_a_part_is_told_as_on_one_machine(connected: Any, tmp_path: Path) -> None:
    broken = gaussian(96, 64)
    broken[3, 5] = float("nan")
    source = write_folder(tmp_path / "source", {"a.weight": gaussian(96, 64), "b.weight": broken})
    with pytest.raises(ConfigError, match=r"^b\.weight: expected finite weights, got NaN.*--copy-nonfinite"):
        compress(source, tmp_path / "out", OPTIONS, run=on(connected))


def test_nodes_with_too_little_room_are_waited_for(
    connected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(tmp_path / "source", {"a.weight": gaussian(96, 64)})
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    said: list[str] = []
    added: list[Any] = []

    def note(sentence: str) -> None:
        said.append(sentence)
        added.append(connected.add_node(**NODE | {"num_cpus": 3}))

    compress(source, tmp_path / "out", OPTIONS, run=on(connected, threads=3, note=note))
    connected.remove_node(added[0], allow_graceful=False)
    (sentence,) = said
    assert sentence.startswith("warning: --engine ray: expected a node with 3 processors and 0.7 GB, got none of ")


def test_nodes_with_another_version_are_refused(
    connected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(tmp_path / "source", {"a.weight": gaussian(96, 64)})
    monkeypatch.setattr(engine, "installed", lambda: "0.0.9 (12345678)")
    message = (
        r"^--engine ray: expected spectral-surgery 0\.0\.9 \(12345678\) on every node, got 0\.1\.0 \(\w{8}\) on .*\.$"
    )
    with pytest.raises(BackendError, match=message) as told:
        compress(source, tmp_path / "out", OPTIONS, run=on(connected))
    assert "\n" not in str(told.value)


def test_a_node_without_this_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spectral_surgery.engines.part", None)  # as of a version before it
    message = r"^--engine ray: expected spectral-surgery 0\.1\.0 .* on every node, got another one \(.*part"
    with pytest.raises(ImportError, match=message):
        calling()("0.1.0 (12345678)", b"")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("OutOfMemoryError", "stopped for memory"),
        ("ObjectStoreFullError", "the object store is full"),
        ("OutOfDiskError", "the disk of the object store is full"),
        ("WorkerCrashedError", "lost 9 times"),
        ("NodeDiedError", "lost 9 times"),
        ("RuntimeEnvSetupError", "Ray failed"),
    ],
)
def test_what_fails_in_ray_is_one_line(source: Path, name: str, reason: str) -> None:
    error = getattr(ray.exceptions, name)("no room\nat all")
    unit = plan_compression(source, OPTIONS)[1].units[0]
    told = str(explained(error, f"{unit.tensor.info.name}, part {unit.part}"))
    assert re.match(rf"--engine ray: {re.escape(unit.tensor.info.name)}, part 0: .*{reason}.*--resume\.$", told)


def test_bytes_that_cannot_be_read_for_a_moment_are_read_again(connected: Any, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"a.weight": gaussian(96, 64), "b.weight": gaussian(64, 96)})
    compress(source, tmp_path / "expected", OPTIONS)
    file, failures = source / "model.safetensors", tmp_path / "failures"

    @dataclass(frozen=True)
    class Flaky:  # of a function, so that it is sent as it is
        """A file elsewhere, that nodes cannot read at first."""

        driver: int
        times: int
        name: str = "model.safetensors"
        size: int = file.stat().st_size
        version: str = "1"

        def read_into(self, view: memoryview, start: int) -> None:
            failed = failures.read_text() if failures.exists() else ""
            if os.getpid() != self.driver and len(failed) < self.times:
                failures.write_text(failed + ".")
                raise UnansweredError("the line is dead")
            view[:] = file.read_bytes()[start : start + view.nbytes]

    def far(times: int) -> RemoteCheckpoint:
        names = (Path("config.json"), Path("tokenizer.json"))
        return RemoteCheckpoint(source, {file: Flaky(os.getpid(), times)}, names, "org/far", "1")

    compress(far(3), tmp_path / "out", OPTIONS, run=on(connected))
    assert len(failures.read_text()) == 3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected")]
    assert weights[0] == weights[1]
    with pytest.raises(CheckpointError, match=r"^[ab]\.weight, part 0: the line is dead Finished parts are kept: run"):
        compress(far(10**6), tmp_path / "never", OPTIONS, run=on(connected))


def test_parts_are_read_from_the_hub_by_the_nodes(
    cluster: Any, expected: dict[str, bytes], source: Path, tmp_path: Path
) -> None:
    """The nodes do not know the address of this Hub, and nobody is logged in there."""
    with (
        serving(tmp_path / "objects") as hub,
        running(tmp_path / "client", hub.endpoint, {"HF_TOKEN": TOKEN}) as client,
    ):
        hub.seed("org/far", source)
        options = ("--bits", "3", "--engine", "ray", "--ray-address", cluster.address, "--token", TOKEN)
        client.result("compress", "org/far", tmp_path / "out", *options)
        asked = [record.line for record in hub.log]
    assert any(line.endswith("model.safetensors") for line in asked)
    found = contents(tmp_path / "out")
    assert {name: found[name] for name in expected if name != "README.md"} == {
        name: data for name, data in expected.items() if name != "README.md"
    }
