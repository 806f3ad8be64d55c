"""The sweep: every model in a process of its own, some at once, one JSON line each; what is done is not done again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.zoo.corpus import Corpus
from tests.zoo.entry import Entry
from tests.zoo.outcome import Outcome, Status

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds for one model
Check = Callable[[Entry, Path, Corpus], dict[str, Outcome]]
Record = dict[str, Any]


def fingerprint(root: Path = ROOT) -> str:
    """Of the code that is tested, of the zoo, and of the libraries below: results of another one do not count."""
    import peft
    import torch
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {peft.__version__}".encode())
    for folder in ("spectral_surgery", "tests/zoo", "tests/support"):
        for path in sorted((root / folder).rglob("*.py")):
            if not path.name.startswith("test_"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def record_of(entry: Entry, outcomes: dict[str, Outcome], stamp: str) -> Record:
    """One line of the results."""
    steps = {name: outcome.to_json() for name, outcome in outcomes.items()}
    return {"name": entry.name, "type": entry.type, "stamp": stamp, "steps": steps}


def read_results(file: Path, stamp: str | None = None) -> dict[str, Record]:
    """The last line of each model, those of one fingerprint only if it is given; a line cut short does not count."""
    found: dict[str, Record] = {}
    if not file.exists():
        return found
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if stamp is None or record["stamp"] == stamp:
            found[record["name"]] = record
    return found


@dataclass
class _Running:
    entry: Entry
    process: BaseProcess
    answer: Connection
    since: float


def sweep(
    entries: Iterable[Entry],
    file: Path,
    *,
    stamp: str,
    check: Check,
    corpus: Corpus,
    processes: int,
    patience: float = PATIENCE,
    say: Callable[[str], None] = print,
) -> None:
    """Check every model that ``file`` has no line of with this ``stamp``, ``processes`` at a time.

    A model whose process dies, or takes more than ``patience`` seconds, gets a line that says so.
    """
    done = read_results(file, stamp)
    waiting = [entry for entry in entries if entry.name not in done]
    total, running = len(waiting), list[_Running]()
    say(f"{total} models to check, {len(done)} were checked before")
    work = file.parent / "work"
    start, finished = time.monotonic(), 0
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(_start(waiting.pop(0), work, corpus, check))
        wait([own.answer for own in running], timeout=1.0)
        for own in [own for own in running if own.answer.poll() or time.monotonic() - own.since > patience]:
            running.remove(own)
            outcomes = _finish(own)
            with file.open("a") as opened:
                opened.write(json.dumps(record_of(own.entry, outcomes, stamp)) + "\n")
            finished += 1
            say(_progress(own, outcomes, finished, total, time.monotonic() - start))


def _start(entry: Entry, work: Path, corpus: Corpus, check: Check) -> _Running:
    context = multiprocessing.get_context("fork")  # transformers and torch are imported once, in the parent
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, entry, work / entry.name, corpus, check), daemon=True)
    process.start()
    there.close()
    return _Running(entry, process, here, time.monotonic())


def _child(answer: Connection, entry: Entry, folder: Path, corpus: Corpus, check: Check) -> None:
    answer.send({name: outcome.to_json() for name, outcome in check(entry, folder, corpus).items()})


def _finish(own: _Running) -> dict[str, Outcome]:
    """The child's answer; one outcome that says how it ended when there is none."""
    try:
        steps = own.answer.recv() if own.answer.poll() else None
    except EOFError:
        steps = None
    if steps is None:
        own.process.kill()
    own.process.join()
    own.answer.close()
    if steps is not None:
        return {name: Outcome.from_json(step) for name, step in steps.items()}
    line = f"the process ended with {own.process.exitcode} after {time.monotonic() - own.since:.0f} s"
    return {"build": Outcome(Status.WRONG, line)}


def _progress(own: _Running, outcomes: dict[str, Outcome], finished: int, total: int, seconds: float) -> str:
    left = seconds / finished * (total - finished)
    wrongs = [name for name, outcome in outcomes.items() if outcome.status is Status.WRONG]
    took = time.monotonic() - own.since
    what = f"wrong: {', '.join(wrongs)}" if wrongs else "ok"
    return f"{finished}/{total}, {_minutes(left)} left: {own.entry.name} {took:.0f} s, {what}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
