"""Writes what the documentation takes from the source: docs/cli.md and docs/architecture.svg.

python docs/generate.py; `make docs` does it first, and tests/test_docs.py checks that the committed files are these.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "spectral_surgery"
GROUPS = {
    "Compress": ("inspect", "compress", "decompress", "heal", "eval", "report"),
    "Run": ("generate", "export"),
    "Adapters": ("train", "inject", "merge", "unmerge", "extract"),
    "Token mixers": ("swap",),
    "The Hub": ("push", "pull"),
}
VARIANTS = {"train": ("--init fftnet",)}  # options with which a command takes other arguments
REST = "Other"
COMMON = "errors, tables, options"  # the modules that lie beside the rooms

Graph = dict[str, set[str]]

# ------------------------------------------------------------------------------------------------ the command line


def cli_page() -> str:
    """The page of all commands, from click."""
    from spectral_surgery.cli import cli

    context = click.Context(cli, info_name="spectral-surgery")
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    listed = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, REST: tuple(name for name in commands if name not in listed)}
    lines = [
        "<!-- Written by docs/generate.py from the commands themselves; do not edit. -->",
        "# Command line",
        "",
        *_paragraphs(cli.help or ""),
        "",
        "| | command | what it does |",
        "|---|---|---|",
    ]
    for group, names in groups.items():
        for number, name in enumerate(names):
            first = _paragraphs(commands[name].help or "")[0]
            lines.append(f"| {'' if number else group} | [{name}](#{name}) | {first} |")
    for names in groups.values():
        for name in names:
            lines += ["", *_command(name, commands[name], context)]
            for option in VARIANTS.get(name, ()):
                variant = cli.resolve_command(context, [name, *option.split()])[1]
                lines += ["", *_command(f"{name} {option}", variant or commands[name], context)]
    return "\n".join(lines) + "\n"


def _command(name: str, command: click.Command, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from (f"## {name}", "", f"`{usage}`", "", *_paragraphs(command.help or ""))
    options = (option for option in command.params if isinstance(option, click.Option))
    records = [record for option in options if (record := option.get_help_record(context))]
    if records:
        yield from ("", "| option | |", "|---|---|")
        for cells in records:
            option, text = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
            yield f"| `{option}` | {text} |"


def _paragraphs(text: str) -> list[str]:
    """Help text as Markdown: examples, which click leaves as they are, become a block."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if lines:
            lines.append("")
        if paragraph.startswith("\b"):
            _, title, *example = paragraph.splitlines()
            lines += [title, "", "```bash", *(line.removeprefix("  ") for line in example), "```"]
        else:
            lines.append(" ".join(paragraph.split()))
    return lines


# ------------------------------------------------------------------------------------------------------ the picture


class Point(NamedTuple):
    """A place in the picture."""

    x: float
    y: float


def rooms(package: Path = PACKAGE) -> Graph:
    """Which room imports which others; modules beside the rooms count as one."""
    graph: Graph = {COMMON: set()}
    for path in sorted(package.rglob("*.py")):
        here = _room(package, path.relative_to(package).parts[0])
        if not here:
            continue
        names = graph.setdefault(here, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                root, _, rest = module.partition(".")
                other = _room(package, rest.partition(".")[0]) if root == package.name and rest else ""
                names |= {other} - {"", here}
    return graph


def _room(package: Path, name: str) -> str:
    if (package / name).is_dir():
        return name
    name = name.removesuffix(".py")
    return COMMON if (package / f"{name}.py").exists() and not name.startswith("__") else ""


def needed(graph: Graph) -> Graph:
    """The imports that do not follow from others: without A to C where A imports B and B imports C."""
    below: Graph = {}

    def reach(room: str) -> set[str]:
        if room not in below:
            below[room] = set().union(*({other} | reach(other) for other in graph[room]))
        return below[room]

    return {room: {o for o in others if not any(o in reach(x) for x in others - {o})} for room, others in graph.items()}


def floors(graph: Graph) -> dict[str, int]:
    """The floor of each room: one above the highest that it imports."""
    level: dict[str, int] = {}

    def visit(room: str) -> int:
        if room not in level:
            level[room] = 1 + max(map(visit, sorted(graph[room])), default=-1)
        return level[room]

    for room in sorted(graph):
        visit(room)
    return level


def picture(graph: Graph) -> str:
    """The rooms, floor by floor, and arrows for the imports that do not follow from others: an SVG."""
    arrows, level = needed(graph), floors(graph)
    routes: dict[tuple[str, str], list[str]] = {}  # an arrow over several floors has a stop on each
    grid: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for room in sorted(graph):
        grid[level[room]].append(room)
    for room, others in sorted(arrows.items()):
        for other in sorted(others):
            stops = [f"{room}>{other}@{floor}" for floor in range(level[room] - 1, level[other], -1)]
            routes[room, other] = [room, *stops, other]
            for floor, stop in zip(range(level[room] - 1, level[other], -1), stops, strict=True):
                grid[floor].append(stop)
    _untangle(grid, [pair for route in routes.values() for pair in pairwise(route)])
    return _svg(grid, routes)


def _untangle(grid: list[list[str]], links: list[tuple[str, str]]) -> None:
    """Order each floor by where its neighbours are, up and down by turns; keep the order with the fewest crossings."""
    near: dict[str, list[str]] = {}
    for one, other in links:
        near.setdefault(one, []).append(other)
        near.setdefault(other, []).append(one)
    best, fewest = [list(row) for row in grid], _crossings(grid, links)
    for turn in range(24):
        order = range(1, len(grid)) if turn % 2 == 0 else range(len(grid) - 2, -1, -1)
        for floor in order:
            beside = grid[floor - 1 if turn % 2 == 0 else floor + 1]
            place = {name: (i + 0.5) / len(beside) for i, name in enumerate(beside)}
            here = {name: (i + 0.5) / len(grid[floor]) for i, name in enumerate(grid[floor])}

            def middle(name: str, place: dict[str, float] = place, here: dict[str, float] = here) -> float:
                known = [place[other] for other in near.get(name, []) if other in place]
                return sum(known) / len(known) if known else here[name]

            grid[floor].sort(key=middle)
        if (crossings := _crossings(grid, links)) < fewest:
            best, fewest = [list(row) for row in grid], crossings
    grid[:] = best


def _crossings(grid: list[list[str]], links: list[tuple[str, str]]) -> int:
    place = {name: (floor, i) for floor, row in enumerate(grid) for i, name in enumerate(row)}
    ends = [(place[one], place[other]) for one, other in links]
    return sum(
        a[0] == c[0] and (a[1] - c[1]) * (b[1] - d[1]) < 0
        for number, (a, b) in enumerate(ends)
        for c, d in ends[:number]
    )


def _svg(grid: list[list[str]], routes: dict[tuple[str, str], list[str]]) -> str:
    width, step, high = 900, 84, 34
    at: dict[str, Point] = {}
    sizes: dict[str, float] = {}
    for floor, row in enumerate(reversed(grid)):
        shares = [22.0 if "@" in name else 9.5 * len(name) + 44 for name in row]
        gap = (width - sum(shares)) / (len(row) + 1)
        x = gap
        for name, share in zip(row, shares, strict=True):
            at[name], sizes[name] = Point(x + share / 2, 40 + step * floor), share - 20
            x += share + gap
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {step * len(grid)}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#567"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for route in routes.values():
        first, *between, last = (at[name] for name in route)
        points = [Point(first.x, first.y + high / 2), *between, Point(last.x, last.y - high / 2)]
        path = f"M{points[0].x:.0f} {points[0].y:.0f}"
        for one, other in pairwise(points):
            half = (one.y + other.y) / 2
            path += f"C{one.x:.0f} {half:.0f} {other.x:.0f} {half:.0f} {other.x:.0f} {other.y:.0f}"
        lines.append(f'<path d="{path}" fill="none" stroke="#9ab" stroke-width="1.5" marker-end="url(#tip)"/>')
    for name, (x, y) in at.items():
        if "@" in name:
            continue
        wide = sizes[name]
        lines.append(
            f'<rect x="{x - wide / 2:.0f}" y="{y - high / 2:.0f}" width="{wide:.0f}" height="{high}" rx="6" '
            f'fill="#eef4fa" stroke="#357"/><text x="{x:.0f}" y="{y + 5:.0f}" font-size="15" text-anchor="middle" '
            f'fill="#123">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


FILES = {"cli.md": cli_page, "architecture.svg": lambda: picture(rooms())}

if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    for file, written in FILES.items():
        (DOCS / file).write_text(written(), encoding="utf-8")
