"""Our command line with the real huggingface_hub, in a process of its own: it reads HF_ENDPOINT when it is imported.

One process runs many commands, since starting it takes seconds. It does not sleep between attempts, but says how long
it would have.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import spectral_surgery
from benchmarks.case import CheckFailedError, require

_LEFT_OUT = ("HF_", "SPECTRAL_SURGERY_")  # settings of this process that are not the client's


@dataclass(frozen=True)
class Done:
    """A finished command.

    Attributes:
        code: how it exited.
        stdout: all of it.
        stderr: what Python wrote to it.
        slept: seconds it would have waited.
    """

    code: int
    stdout: str
    stderr: str
    slept: float

    def json(self) -> dict[str, Any]:
        """The one object it printed.

        Raises:
            CheckFailedError: when it failed.
        """
        require(self.code == 0, f"the command failed: {self.stderr.strip()[-500:]}")
        body: dict[str, Any] = json.loads(self.stdout)
        return body


@dataclass(frozen=True)
class Client:
    """Runs commands, one at a time.

    Attributes:
        process: where they run.
        said: file with all that the process itself wrote to stderr.
        home: its HF_HOME.
    """

    process: subprocess.Popen[str]
    said: Path
    home: Path

    def run(self, *arguments: object, environment: Mapping[str, str | None] | None = None) -> Done:
        """Run one command.

        Args:
            arguments: as after ``spectral-surgery``.
            environment: variables for this command alone; None removes one.

        Raises:
            CheckFailedError: when the process has died.
        """
        order = {"argv": [str(argument) for argument in arguments], "environment": dict(environment or {})}
        answer = ""
        if self.process.stdin and self.process.stdout:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise CheckFailedError(f"the client died: {self.said.read_text(encoding='utf-8')[-500:]}")
        return Done(**json.loads(answer))

    def result(self, *arguments: object) -> dict[str, Any]:
        """Run one command; its JSON.

        Raises:
            CheckFailedError: when it failed.
        """
        return self.run(*arguments, "--json", "--quiet").json()


@contextmanager
def running(folder: Path, endpoint: str, environment: Mapping[str, str]) -> Iterator[Client]:
    """A client of the Hub at an endpoint, with a cache of its own.

    Args:
        folder: for the cache and what the process says.
        endpoint: of the Hub.
        environment: variables of the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    package = str(Path(spectral_surgery.__file__).parents[1])  # the one that is running, installed or not
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": package}
    settings = {**own, **environment}
    said = folder / "stderr"
    with said.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder,
            env=kept | settings,
        )
        with process:
            try:
                yield Client(process, said, Path(settings["HF_HOME"]))
            finally:
                if process.stdin:
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.close()
                process.wait(timeout=30)


def serve() -> None:
    """Run commands from stdin until it ends."""
    answers = sys.stdout
    waits: list[float | SupportsIndex] = []
    time.sleep = waits.append
    for line in sys.stdin:
        waits.clear()
        done = _run(json.loads(line))
        answers.write(json.dumps(done | {"slept": sum(map(float, waits))}) + "\n")
        answers.flush()


def _run(order: dict[str, Any]) -> dict[str, Any]:
    """Run one command as ``python -m spectral_surgery`` would."""
    sys.argv = ["spectral-surgery", *order["argv"]]
    before = dict(os.environ)
    os.environ.update({name: value for name, value in order["environment"].items() if value is not None})
    for name, value in order["environment"].items():
        if value is None:
            os.environ.pop(name, None)
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_module("spectral_surgery", run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
    os.environ.clear()
    os.environ.update(before)
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":
    serve()
