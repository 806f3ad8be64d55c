"""The compression engine as a user runs it: memory of a large checkpoint, and what a second worker brings."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks.case import Row, require
from benchmarks.language_model import Size, write_model
from spectral_surgery.errors import BackendError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.writer import Entry, tensor_bytes, write_checkpoint

GIB = 1 << 30
MEMORY = 850_000_000
SPEEDUP = 1.7
ROUNDS = 3
_SIDE = 4096
_SHARD = GIB // 2
_PIECES = 8
_TINY = Size(64, 64, 1, 1024)


def run_memory(quick: bool) -> list[Row]:
    """Peak resident memory of compress and decompress, for a checkpoint and one of half its size.

    Most of it is Python and the libraries, which a checkpoint of next to nothing shows.
    """
    full = GIB // 2 if quick else 4 * 10**9
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        _require_room(Path(scratch), 3 * full)
        tiny = write_model(Path(scratch) / "tiny", _TINY)
        done = run_command("compress", str(tiny), str(Path(scratch) / "small"), "--bits", "4", "--threads", "2")
        rows.append(_memory_row("compress", read_index(tiny).nbytes, done) | {"target": "", "met": ""})
        for nbytes in (full // 2, full):
            source = generate(Path(scratch) / f"source-{nbytes}", nbytes)
            out, plain = Path(scratch) / "out", Path(scratch) / "plain"
            made = run_command("compress", str(source), str(out), "--bits", "4", "--threads", "2")
            rows.append(_memory_row("compress", nbytes, made))
            shutil.rmtree(source)
            back = run_command("decompress", str(out), str(plain), "--threads", "2")
            rows.append(_memory_row("decompress", nbytes, back))
            shutil.rmtree(out)
            shutil.rmtree(plain)
    return rows


def run_workers(quick: bool) -> list[Row]:
    """Seconds with one worker and with two, one thread each; the output must be the same, byte for byte."""
    nbytes = GIB // 4 if quick else 4 * GIB  # starting, four seconds, is not shared
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        _require_room(Path(scratch), 3 * nbytes)
        source = generate(Path(scratch) / "source", nbytes)
        for _ in range(ROUNDS):
            for workers, taken in seconds.items():
                out = Path(scratch) / f"out-{workers}"
                shutil.rmtree(out, ignore_errors=True)
                started = time.perf_counter()
                options = ("--bits", "4", "--workers", str(workers), "--threads", "1")
                run_command("compress", str(source), str(out), *options)
                taken.append(time.perf_counter() - started)
        same = all(
            (Path(scratch) / "out-2" / path.name).read_bytes() == path.read_bytes()
            for path in (Path(scratch) / "out-1").iterdir()
        )
        require(same, "two workers wrote other bytes than one")
    ratio = median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    return [
        {
            "checkpoint": f"{nbytes / GIB:g} GiB bfloat16",
            "1 worker, s": median(seconds[1]),
            "2 workers, s": median(seconds[2]),
            "ratio": ratio,
            "target": f">= {SPEEDUP}",
            "met": ratio >= SPEEDUP,
        }
    ]


def generate(folder: Path, nbytes: int) -> Path:
    """Write a sharded bfloat16 checkpoint of Gaussian matrices, without holding more than a piece of one."""
    folder.mkdir()

    def matrix(seed: int) -> Entry:
        def chunks() -> Iterator[memoryview]:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(_PIECES):
                values = 0.02 * torch.randn(_SIDE // _PIECES, _SIDE, generator=generator)
                yield tensor_bytes(values.to(torch.bfloat16))

        return Entry(f"model.layers.{seed}.mlp.up_proj.weight", "BF16", (_SIDE, _SIDE), chunks)

    count = max(2, nbytes // (2 * _SIDE * _SIDE))
    write_checkpoint(folder, [matrix(seed) for seed in range(count)], max_shard_size=_SHARD)
    return folder


def run_command(*arguments: str, quiet: bool = True) -> dict[str, object]:
    """Run the command line in a process of its own; its JSON.

    Args:
        arguments: the command and what it is given.
        quiet: with ``--quiet``, which commands that show progress have.

    Raises:
        CheckFailedError: when it fails.
    """
    command = [sys.executable, "-m", "spectral_surgery", *arguments, "--json", *(["--quiet"] if quiet else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    require(done.returncode == 0, f"{arguments[0]} failed: {done.stderr.strip()[-300:]}")
    body: dict[str, object] = json.loads(done.stdout)
    return body


def _memory_row(what: str, nbytes: int, body: dict[str, object]) -> Row:
    peak = int(str(body["peak_rss_bytes"]))
    return {
        "command": what,
        "checkpoint": f"{nbytes / 1e9:.2g} GB bfloat16",
        "seconds": float(str(body["seconds"])),
        "peak memory, MB": peak / 1e6,
        "target": f"<= {MEMORY / 1e6:.0f}" if what == "compress" else "",
        "met": peak <= MEMORY if what == "compress" else "",
    }


def _require_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise BackendError(
            f"bench: {free / 1e9:.1f} GB free in {folder}; {nbytes / 1e9:.1f} GB are needed. Use --quick."
        )
