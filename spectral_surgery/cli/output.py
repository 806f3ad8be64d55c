"""What the user sees: tables or one JSON object on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import click

from spectral_surgery.progress import Progress

SCHEMA_VERSION = 1
_LINES = 10  # progress lines of a run without a terminal
_NAMED = 3  # of the names that share a reason; --json has all


@contextmanager
def progress(unit: str = "", *, quiet: bool | None = None) -> Iterator[Progress]:
    """A bar on a terminal, a line for every tenth elsewhere, nothing when quiet; on stderr, with the time left.

    ``quiet``: report nothing; None asks --quiet.
    """
    from tqdm import tqdm

    silent, terminal = click.get_current_context().params["quiet"] if quiet is None else quiet, sys.stderr.isatty()
    bar = tqdm(disable=silent or not terminal, leave=False, unit=unit, unit_scale=True, file=sys.stderr)
    shown, left = 0, _TimeLeft()

    def report(done: int, total: int, what: str) -> None:
        nonlocal shown, left
        if done * _LINES // max(total, 1) < shown:  # the next stage of the same command
            shown, left = 0, _TimeLeft()
        estimate = left.after(done, total)
        if terminal:
            bar.total = total
            bar.set_postfix_str(what[-48:], refresh=False)
            bar.update(done - bar.n)
        elif not silent and done * _LINES // max(total, 1) > shown:
            shown = done * _LINES // max(total, 1)
            click.echo(f"{done / total:4.0%} {what}{estimate}", err=True)

    with bar:
        yield report


class _TimeLeft:
    """How long a stage goes on at its speed since its first report."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # seconds, and what was done by then

    def after(self, done: int, total: int) -> str:
        """In words with a comma before them; empty where it is unknown, or nothing is left."""
        now = time.perf_counter()
        started, before = self._first = self._first or (now, done)
        if not before < done < total:
            return ""
        seconds = (now - started) * (total - done) / (done - before)
        for unit, size in (("h", 3600), ("min", 60)):
            if seconds >= 2 * size:
                return f", {seconds / size:.0f} {unit} left"
        return f", {seconds:.0f} s left"


def show(body: Mapping[str, object], lines: Iterable[str]) -> None:
    """Print the result of the running command: with --json the body as one object, else the lines."""
    ctx = click.get_current_context()
    if ctx.params["as_json"]:
        print_json(str(ctx.command.name), body)
        return
    for line in lines:
        click.echo(line)


def nothing_written() -> None:
    """Say so at the end of --dry-run, beside a result that is the same without it."""
    click.echo("Nothing was written.", err=click.get_current_context().params["as_json"])


def print_json(command: str, body: Mapping[str, object]) -> None:
    """Print one JSON object on stdout: the result of a command, in plain values."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "command": command, **body}, indent=2))


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> str:
    """Rows as aligned text with a header, numbers to the right; empty without rows."""
    if not rows:
        return ""
    names = list(columns) or list(rows[0])
    cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    right = [all(isinstance(row.get(name, 0), (int, float)) for row in rows) for name in names]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def notes(sentences: Iterable[str]) -> Iterator[str]:
    """What a result needs to be read with, a line for each sentence."""
    return (f"note: {sentence}" for sentence in sentences)


def note(sentence: str) -> None:
    """A line on stderr while the work goes on, unless --quiet; warnings always."""
    if sentence.startswith("warning") or not click.get_current_context().params["quiet"]:
        click.echo(sentence, err=True)


def by_reason(what: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """A line for each reason, with the first of the names that share it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, those in names.items():
        more = ", ..." if len(those) > _NAMED else ""
        yield f"{what}, {reason}: {len(those)} ({', '.join(those[:_NAMED])}{more})"


def size(nbytes: float) -> str:
    """Bytes for people: ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 0.1 else f"{value:.3f}"
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value))
    return str(value)
