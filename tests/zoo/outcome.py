"""How a step ended: right, not applicable, refused in one line, or wrong."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from spectral_surgery.errors import SpectralSurgeryError
from tests.support.command import run

CHECK_FAILED = 3  # exit code of a check that did not pass
LONGEST = 400
Numbers = dict[str, float]


class Status(StrEnum):
    """What became of a step."""

    OK = "ok"
    NOT_APPLICABLE = "not applicable"
    REFUSED = "refused"
    WRONG = "wrong"


@dataclass(frozen=True)
class Outcome:
    """A step's status, the line that says why when it is not ok, and what was measured."""

    status: Status
    line: str = ""
    seconds: float = 0.0
    numbers: Numbers = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Outcome:
        return cls(Status(record["status"]), record["line"], record["seconds"], dict(record["numbers"]))


class NotApplicable(Exception):  # noqa: N818 - no error: the step has nothing to do
    """The model has nothing that the step could work on, or the host library cannot do it without us either."""


class Refused(Exception):  # noqa: N818 - a right answer
    """The command said in one line that it does not do this."""


class Wrong(Exception):  # noqa: N818 - found, not raised, by what is tested
    """Another result than the right one."""


def wrong(line: str) -> NoReturn:
    raise Wrong(line)


def require(holds: bool, line: str) -> None:
    if not holds:
        raise Wrong(line)


def command(*arguments: str | Path) -> tuple[dict[str, Any], str]:
    """Run a command with --json: (its object, what it said on stderr).

    Raises:
        Refused: when it ended with one line that begins with ``Error:``.
        Wrong: when it failed in another way. A traceback comes through as what it is.
    """
    done = run(*arguments, "--json", "-q")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == 0:
        return json.loads(done.stdout), done.stderr
    errors = [line for line in said if line.startswith("Error: ")]
    if done.returncode == 1 and len(errors) == 1 and said[-1] == errors[0]:
        raise Refused(errors[0].removeprefix("Error: "))
    how = "a check failed" if done.returncode == CHECK_FAILED else f"exit code {done.returncode}"
    raise Wrong(f"{how}: {' '.join(said[-3:])}")


def attempt(step: Callable[[], Numbers | None]) -> Outcome:
    """Run a step; whatever it raises becomes its outcome."""
    start = time.perf_counter()
    status, line, numbers = Status.OK, "", {}
    try:
        numbers = step() or {}
    except NotApplicable as reason:
        status, line = Status.NOT_APPLICABLE, str(reason)
    except (Refused, SpectralSurgeryError) as refusal:
        status, line = Status.REFUSED, str(refusal)
    except Wrong as found:
        status, line = Status.WRONG, str(found)
    except Exception as error:  # noqa: BLE001 - any other is a traceback for a user
        status, line = Status.WRONG, f"{type(error).__name__}: {error} ({_place(error)})"
    if status is Status.REFUSED and "\n" in line.strip():
        status = Status.WRONG
    return Outcome(status, short(line), round(time.perf_counter() - start, 2), numbers)


def _place(error: Exception) -> str:
    """File and line: the last of this project that is not a test, else the last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/spectral_surgery/" in frame.filename and "/tests/" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def short(text: str) -> str:
    """One line of at most LONGEST characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 3]} ... {line[-2 * LONGEST // 3 :]}"
