"""A source that stays on the Hub: what reading it by ranges takes in time, bytes and disk, beside the same from disk.

The real huggingface_hub reads from a Hub on this machine, whose line is as fast as it is said to be. Every figure is
shown only after the bytes of the result were compared with those that come of the local folder.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import Row, require
from benchmarks.cases.hub import checkpoint
from tests.hub_server import TOKEN, LoopbackHub, serving
from tests.hub_server.client import Client, running

LINE = 200e6  # bytes a second
CUTS = 10
DISK, MOVED, TIME = 200e6, 1.02, 1.3  # bytes beyond OUT; over the bytes of the tensors; over the slower of both
HEADER = 1 << 15  # bytes read of each file for its header
_POLL = 0.02  # seconds between looks at the disk
_WEIGHTS = r"GET .*/resolve/.*\.safetensors$"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the checkpoints, and how many files each has."""

    timed: int
    timed_files: int
    cut: int


FULL = Sizes(2_000_000_000, 8, 400_000_000)
QUICK = Sizes(160_000_000, 4, 40_000_000)


@dataclass(frozen=True)
class Bench:
    """A Hub, its client, and the folder in which all of it is."""

    hub: LoopbackHub
    client: Client
    scratch: Path

    def compress(self, source: object, out: Path, *options: object) -> float:
        """Compress to 4 bits; the seconds that the command takes."""
        started = time.perf_counter()
        self.client.result("compress", source, out, "--bits", "4", *options)
        return time.perf_counter() - started


def run(quick: bool) -> list[Row]:
    """From a fast line, and from one that is cut."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "tmp").mkdir()
        environment = {"HF_TOKEN": TOKEN, "TMPDIR": str(scratch / "tmp")}
        with (
            serving(scratch / "objects") as hub,
            running(scratch / "client", hub.endpoint, environment) as client,
        ):
            bench = Bench(hub, client, scratch)
            return [*timed(bench, sizes), cut(bench, sizes)]


def timed(bench: Bench, sizes: Sizes) -> list[Row]:
    """Compress from the Hub beside the same from disk: time, bytes that are moved, and disk that is used."""
    hub, scratch = bench.hub, bench.scratch
    source = checkpoint(scratch / "source", sizes.timed, sizes.timed_files)
    size = _weights(source)
    hub.seed("org/far", source)
    bench.compress(source, scratch / "warm", "--include", "*.0.proj.*")  # what is compiled and cached, once
    local = bench.compress(source, scratch / "local", "--workers", 2)
    hub.reset()
    hub.speed.limit = LINE
    with watched(scratch, leave_out=(source, scratch / "local", scratch / "warm")) as used:
        far = bench.compress("org/far", scratch / "far", "--workers", 2)
    moved = sum(record.sent for record in hub.log)
    hub.reset()
    _require_equal(scratch / "far", scratch / "local")
    beyond = max(used) - _bytes_in(scratch / "far")
    network = moved / LINE
    over = far / max(network, local)
    return [
        _row("seconds, from the Hub", far, f"<= {TIME} x the slower of both below", met=over <= TIME),
        _row("seconds, from disk", local),
        _row(f"seconds, of the line at {LINE / 1e6:.0f} MB/s", network),
        _row("seconds over the slower of both", over, f"<= {TIME}", met=over <= TIME),
        _row("bytes moved over those of the tensors", moved / size, f"<= {MOVED}", met=moved <= MOVED * size),
        _row("MB of disk used beyond OUT", beyond / 1e6, f"<= {DISK / 1e6:.0f}", met=beyond <= DISK),
    ]


def cut(bench: Bench, sizes: Sizes) -> Row:
    """Let the line go dead at a random byte of each of ten files in turn, and go on each time."""
    hub, out = bench.hub, bench.scratch / "cut"
    source = checkpoint(bench.scratch / "cut-source", sizes.cut, CUTS)
    bench.compress(source, bench.scratch / "cut-local")
    hub.seed("org/cut", source)
    hub.reset()
    chance, done, again = random.Random(0), dict[str, int](), 0  # noqa: S311 - repeatable, no secret
    for number in range(1, CUTS + 1):
        name = f"model-{number:05d}-of-{CUTS:05d}.safetensors"
        file = rf"GET .*/resolve/.*{name}$"
        hub.fail(file)  # which serves the header, so that the cut is in a part
        hub.fail(file, cut_after=chance.randrange(1, sizes.cut // CUTS - HEADER), times=-1, together=True)
        failed = bench.client.run("compress", "org/cut", out, "--bits", "4", "--resume", "--quiet")
        require(failed.code == 1 and not out.exists(), "a line that went dead did not end the command")
        require(failed.stderr.count("\n") == 1, "a line that went dead was not told in one line")
        hub.faults.clear()
        units = {path.name: path.stat().st_mtime_ns for path in (bench.scratch / "cut.partial").glob("units/*.unit")}
        again += sum(units.get(unit) != written for unit, written in done.items())
        done = units
    require(bool(done), "no part was finished before the last cut")
    bench.compress("org/cut", out, "--resume")
    _require_equal(out, bench.scratch / "cut-local")
    moved = sum(record.sent for record in hub.log) / _weights(source)
    hub.reset()
    what = f"parts done again, line dead {CUTS} times, once at a random byte of each file"
    return _row(what, again, "0, same bytes", met=again == 0) | {"more": f"{moved:.2f} x the bytes moved"}


@contextmanager
def watched(folder: Path, leave_out: tuple[Path, ...]) -> Iterator[list[int]]:
    """What a folder takes on the disk, looked at again and again, beyond what it took before."""
    before, used, stop = _bytes_in(folder, leave_out), [0], threading.Event()

    def look() -> None:
        while not stop.wait(_POLL):
            used.append(_bytes_in(folder, leave_out) - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield used
    finally:
        stop.set()
        thread.join()


def _bytes_in(folder: Path, leave_out: tuple[Path, ...] = ()) -> int:
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or path in leave_out:
            continue
        try:
            total += _bytes_in(path, leave_out) if path.is_dir() else path.stat().st_blocks * 512
        except FileNotFoundError:  # removed meanwhile
            continue
    return total


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _require_equal(one: Path, other: Path) -> None:
    names = {path.name for path in other.iterdir()} - {"README.md"}
    require(names == {path.name for path in one.iterdir()} - {"README.md"}, "a file is missing, or one too many")
    same = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    require(same, "the result from the Hub is not that from disk")


def _row(what: str, value: float, target: str = "", *, met: bool | None = None) -> Row:
    return {"what": what, "found": round(value, 3), "target": target} | ({} if met is None else {"met": met})
