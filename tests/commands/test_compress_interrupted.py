"""compress that is interrupted: unfinished work, full disks, killed processes and workers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress, compress_shard
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files import atomic as publish
from spectral_surgery.files.compressed import parts as part_files
from spectral_surgery.files.compressed import units
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.run import Run
from tests.support.checkpoints import contents, gaussian, llama_like, write_folder

ROOT = Path(__file__).parents[2]
FIFTH = CompressOptions(Target("density", 0.2))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", llama_like())


def test_output_in_the_way_and_unfinished_work(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match=r"expected a new or empty folder, got one with content.*--overwrite"):
        compress(source, tmp_path / "out", FIFTH)
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    assert compress(source, tmp_path / "out", FIFTH, run=Run(overwrite=True)) is not None
    assert not (tmp_path / "out" / "mine").exists()
    compress_shard(source, tmp_path / "half", FIFTH, (0, 2))
    with pytest.raises(CheckpointError, match=r"half\.partial: expected an empty folder, got unfinished work"):
        compress(source, tmp_path / "half", FIFTH)
    assert compress(source, tmp_path / "half", FIFTH, run=Run(resume=True)) is not None
    assert contents(tmp_path / "half") == contents(tmp_path / "out")


def test_resume_ignores_work_of_other_options_and_damaged_units(tmp_path: Path, source: Path) -> None:
    compress_shard(source, tmp_path / "out", CompressOptions(Target("bits", 5.0)), (0, 2))
    unit = next((tmp_path / "out.partial" / "units").iterdir())
    compress(source, tmp_path / "expected", FIFTH)
    compress_shard(source, tmp_path / "third", FIFTH, (0, 2))
    for file in (tmp_path / "third.partial" / "units").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert unit.exists()
    for name in ("out", "third"):
        compress(source, tmp_path / name, FIFTH, run=Run(resume=True))
        assert contents(tmp_path / name) == contents(tmp_path / "expected")


def test_two_processes_do_not_share_a_folder(tmp_path: Path, source: Path) -> None:
    from spectral_surgery.files.lock import hold

    (tmp_path / "out.partial").mkdir()
    with (
        hold(tmp_path / "out.partial", exclusive=True, wait=False),
        pytest.raises(CheckpointError, match=r"out\.partial: expected one.*got another that is working in it"),
    ):
        compress(source, tmp_path / "out", FIFTH, run=Run(resume=True))


def test_a_full_disk_publishes_nothing_and_resumes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publish.replace_file
    calls = iter(range(100))

    def full(path: Path, data: bytes, *, durable: bool = True) -> None:
        if next(calls) == 1:
            with publish.writing_to(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, durable=durable)

    monkeypatch.setattr(part_files, "replace_file", full)
    with pytest.raises(CheckpointError, match="got a full disk"):
        compress(source, tmp_path / "out", FIFTH)
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", FIFTH, run=Run(resume=True))
    compress(source, tmp_path / "expected", FIFTH)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


_RUN = """
import sys
from pathlib import Path
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.run import Run
if __name__ == "__main__":
    print("ready", flush=True)
    compress(Path(sys.argv[1]), Path(sys.argv[2]), CompressOptions(Target("bits", 3.0)), run=Run(resume=True))
"""


@pytest.mark.slow
def test_killed_at_random_moments_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": gaussian(384, 512, seed=i) for i in range(24)}
    source = write_folder(tmp_path / "source", tensors)
    compress(source, tmp_path / "expected", CompressOptions(Target("bits", 3.0)))
    out, chance = tmp_path / "out", random.Random(0)
    kills = 0
    while not out.exists():
        command = [sys.executable, "-c", _RUN, str(source), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if kills < 3:
                time.sleep(chance.uniform(0.05, 0.8))
                process.send_signal(signal.SIGKILL)
                kills += 1
        assert not out.exists() or contents(out) == contents(tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")
    assert not list(tmp_path.glob("out.*"))


def test_a_killed_worker_is_reported_and_its_work_resumed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectral_surgery.engines.local.run_unit", _die)
    with pytest.raises(CheckpointError, match=r"got one killed, .*--resume and fewer --workers"):
        compress(source, tmp_path / "out", FIFTH, run=Run(workers=2))
    monkeypatch.undo()
    assert compress(source, tmp_path / "out", FIFTH, run=Run(resume=True)) is not None


def _die(store: units.UnitStore, *_: object, **__: object) -> None:
    died = store.folder / "died"
    if multiprocessing.parent_process():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not died.exists():  # the other one gets its turn
        time.sleep(0.01)


_RUN_TWO = """
import multiprocessing, sys
from pathlib import Path
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.run import Run
if __name__ == "__main__":
    def say(done, total, what):
        print(multiprocessing.active_children()[0].pid, flush=True)
    options = CompressOptions(Target("bits", 3.0))
    compress(Path(sys.argv[1]), Path(sys.argv[2]), options, run=Run(workers=2, progress=say))
"""


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {f"layers.{i}.weight": gaussian(384, 512, seed=i) for i in range(12)})
    script = tmp_path / "run.py"  # workers import it
    script.write_text(_RUN_TWO)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    gone = time.monotonic() + 60
    while _runs(worker) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not _runs(worker)
    options = CompressOptions(Target("bits", 3.0))
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", options, run=Run(resume=True))
    compress(source, tmp_path / "expected", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may be there to ask how it ended
