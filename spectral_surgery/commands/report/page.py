"""What a page holds, and the one place where it becomes HTML: every text in it is escaped by the template."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from spectral_surgery import __version__
from spectral_surgery.commands.report.drawing import Drawing

_TEMPLATES = Path(__file__).with_name("templates")

Cell = str | int | float | None
Legend = tuple[tuple[str, str], ...]  # class of the style sheet, words


@dataclass(frozen=True)
class Figure:
    """A chart.

    Attributes:
        label: what it shows, for those who do not see it.
        drawings: for each of WIDTHS.
    """

    title: str
    label: str
    drawings: tuple[Drawing, ...]
    caption: str = ""
    legend: Legend = ()


@dataclass(frozen=True)
class Table:
    """A table: numbers stay numbers, so that it sorts by them. ``rows``: cells; None for what is not known."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def kinds(self) -> tuple[str, ...]:
        """The class of the style sheet of each column: ``number`` where there are numbers alone."""
        columns = [[cell for cell in column if cell is not None] for column in zip(*self.rows, strict=True)]
        return tuple("number" if c and not any(isinstance(cell, str) for cell in c) else "" for c in columns)


@dataclass(frozen=True)
class Section:
    """A part of the page: facts by name, a command, charts and tables; what is empty is left out."""

    title: str
    text: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        kind: what was read, in words.
        figures: the most important numbers, by name.
    """

    kind: str
    title: str
    figures: Mapping[str, str]
    sections: tuple[Section, ...]


def table(title: str, rows: Sequence[Mapping[str, Cell]]) -> tuple[Table, ...]:
    """A table of rows with the same keys; none without rows."""
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return (Table(title, names, tuple(tuple(row.get(name) for name in names) for row in rows)),) if rows else ()


def render(page: Page) -> str:
    """The page as HTML that needs nothing else: no script but ours runs in it, and nothing is fetched."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "value": _value, "breakable": _breakable}
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        page=page,
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        version=__version__,
    )


def shown(cell: Cell) -> str:
    """A cell for people."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or not math.isfinite(cell):
        return f"{cell:,}"
    return f"{cell:,.0f}" if abs(cell) >= 1e4 else f"{cell:#.4g}"


def sides(shape: Sequence[object]) -> str:
    """A shape for people."""
    return " x ".join(map(str, shape)) or "scalar"


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _value(cell: Cell) -> str:
    """What a cell sorts by, as JavaScript reads it."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return "" if math.isnan(cell) else f"{'-' if cell < 0 else ''}Infinity"
    return "" if cell is None else str(cell)


def _breakable(text: str) -> Markup:
    """Text whose lines may break at its dots and slashes; escaped."""
    return Markup("<wbr>").join(re.split(r"(?<=[./_])", text))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
