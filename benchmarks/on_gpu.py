"""``python -m benchmarks.on_gpu FILE``: tests and cases for a GPU, into one stamped file that ``--tables`` prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.runner import stamp
from spectral_surgery.cli import run
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.atomic import replace_file

CASES = ("gpu_products", "gpu_streaming")
_TEST_SECONDS, _CASE_SECONDS = 300, 60  # at most: ten minutes of a GPU are enough for all
_Results = dict[str, Any]


@click.command("gpu")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--tables", is_flag=True, help="Print a file that is there as Markdown; nothing is run.")
def command(file: Path, tables: bool) -> None:
    """Run the tests and the bench cases that need a GPU, and write what they found to FILE."""
    if not tables:
        if not torch.cuda.is_available():
            raise ConfigError("gpu: expected a CUDA device, got none. `python -m benchmarks gpu_static` needs no GPU.")
        found = measured(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], [sys.executable, "-m", "benchmarks"]
        )
        replace_file(file, (json.dumps(found, indent=2) + "\n").encode())
    click.echo(as_markdown(_read(file)))


def measured(tests: Sequence[str], bench: Sequence[str]) -> _Results:
    """Run tests, and then each case in a process of its own that ends within a minute.

    Args:
        tests: command that runs the tests.
        bench: command that runs a case, whose name and ``--json`` follow.
    """
    done = _output(tests, _TEST_SECONDS)
    results = []
    for name in CASES:
        said = _output([*bench, name, "--json"], _CASE_SECONDS)
        try:
            results += json.loads(said)["results"]
        except (ValueError, KeyError):
            results.append({"case": name, "status": "FAILED", "reason": _last_line(said)})
    return {"stamp": stamp(), "tests": _last_line(done), "results": results}


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["no output"])[-1]


def _output(command: Sequence[str], seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} s"
    return done.stdout or done.stderr


def _read(file: Path) -> _Results:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("stamp", "tests", "results")}
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file}: expected results of `make gpu`, got something else. Run make gpu.") from None


def as_markdown(found: _Results) -> str:
    """What was found as the tables of a page; a case that failed has its reason in the place of figures."""
    said = ", ".join(f"{name} {value}" for name, value in found["stamp"].items())
    parts = [f"{said}. Tests: {found['tests']}."]
    for result in found["results"]:
        if result["status"] != "ok":
            parts.append(f"{result['case']}: {result['status']}: {result['reason']}")
            continue
        rows = result["rows"]
        columns = list(rows[0]) if rows else []
        lines = [columns, ["---"] * len(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)]
        parts.append("\n".join([f"{result['case']}:", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(parts)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(command)
