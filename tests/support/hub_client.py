"""Our command line with the real huggingface_hub, in a process of its own: it reads HF_ENDPOINT when it is imported.

One process runs many commands, since starting it takes seconds. It does not sleep, but says how long it would have.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    stdout: str
    stderr: str
    slept: float

    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.stderr
        body: dict[str, Any] = json.loads(self.stdout)
        return body


@dataclass
class Client:
    """Runs commands, one at a time; ``said`` is a file with all that was written to the real stderr."""

    process: subprocess.Popen[str]
    said: Path
    home: Path

    def __call__(self, *arguments: object, **environment: str | None) -> Done:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": [str(a) for a in arguments], "environment": environment}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.said.read_text()[-3000:]
        return Done(**json.loads(answer))

    def result(self, *arguments: object, **environment: str | None) -> dict[str, Any]:
        return self(*arguments, "--json", "--quiet", **environment).json()


@contextmanager
def running(folder: Path, endpoint: str, **environment: str) -> Iterator[Client]:
    """A client of the Hub at an endpoint, with a cache of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SPECTRAL_SURGERY_"))}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"} | environment
    said = folder / "stderr"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hub_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=kept | settings,
        )
        with process:
            try:
                yield Client(process, said, Path(settings["HF_HOME"]))
            finally:
                assert process.stdin is not None
                process.stdin.close()
                process.wait(timeout=30)


def serve() -> None:
    """Run commands from stdin until it ends."""
    from spectral_surgery.cli import main

    answers = sys.stdout
    slept = 0.0

    def sleep(seconds: float) -> None:
        nonlocal slept
        slept += seconds

    time.sleep = sleep
    for line in sys.stdin:
        order = json.loads(line)
        slept = 0.0
        sys.argv = ["spectral-surgery", *order["argv"]]
        before = dict(os.environ)
        for name, value in order["environment"].items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        stdout, stderr = io.StringIO(), io.StringIO()
        code: object = 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                main()
            except SystemExit as error:
                code = error.code or 0
        os.environ.clear()
        os.environ.update(before)
        done = {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue(), "slept": slept}
        print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    serve()
