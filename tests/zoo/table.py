"""docs/architectures.md, from the results of the sweep."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.zoo.adapter_steps import LIVE
from tests.zoo.compression_steps import OTHER
from tests.zoo.entry import Entry
from tests.zoo.outcome import Outcome, Status
from tests.zoo.steps import NAMES
from tests.zoo.sweep import ROOT

PAGE = ROOT / "docs" / "architectures.md"
SIGNS = {Status.OK: "✓", Status.NOT_APPLICABLE: "-", Status.REFUSED: "r", Status.WRONG: "✗"}
UNKNOWN = "?"
Results = Mapping[str, Mapping[str, Any]]

_LIVE = (
    "right as PEFT merges the adapter; PEFT's live model has other outputs, as layers share a weight or the model reads"
    " a weight without running the layer"
)
_OTHER = (
    "right as the plain model: transformers saves it so that other outputs come back, and the compressed model becomes"
    " the same"
)
_NOTED = {LIVE: _LIVE, OTHER: _OTHER}
_HEAD = """# What works for which architecture

Written by `make zoo`, not by hand: a tiny random model of each type goes through every command. Every model is built,
saved and loaded by transformers first. ✓ right; - not applicable; r refused, in one line that says why; ✗ wrong;
? not checked.
"""
_STEPS = """
What is checked:

- inspect, compress: at 4 bits a weight; every matrix of 512 weights or more is compressed, or named with the reason.
- decompress: `--verify`; names, shapes, dtypes, errors as reported; what was not compressed has the same bits.
- load: `from_pretrained` of the compressed folder has the outputs of the decompressed model. A percentage: of the
  compressed weights, those that stay spectra; the others are decoded at loading.
- generate: the same greedy tokens as the decompressed model.
- save again: `save_pretrained` of the compressed model loads to the same outputs and decompresses to the same bits.
- dequantize: the outputs of the decompressed model, also saved and loaded. Neither is applicable where transformers
  itself loses something of the plain model when it saves what it has loaded.
- inject, merge, unmerge: a FourierFT adapter for all linear layers; the original comes back bit for bit.
- PEFT: loads the adapter on every layer of it, and has the outputs of the merged model; on compressed: the same on the
  compressed model.
- calibrate, heal, swap: with a text; the folder has the outputs of its decompressed form. A percentage: of the
  compressed weights, those that were calibrated; the command names the others, with reasons.
"""


_AGAIN = "Checked again since, by `python -m tests.zoo --renew NAME...`: "


def page(
    kinds: Mapping[str, tuple[Entry, ...]], left_out: Mapping[str, str], results: Results, again: Iterable[str] = ()
) -> str:
    """The whole page as Markdown; models without a result are listed too. ``again``: what was renewed alone."""
    notes = _Notes()
    entries = [entry for own in kinds.values() for entry in own]
    since = [entry.name for entry in entries if entry.name in {*again}]
    parts = [_HEAD, _counts(entries, results), f"\n{_AGAIN}{', '.join(since)}.\n" if since else "", _STEPS]
    for title, own in kinds.items():
        parts.append(f"\n## {title}\n\n{_table(own, results, notes)}")
    parts.append(notes.text())
    parts.append(_left_out(left_out))
    return "".join(parts)


def outcomes_of(record: Mapping[str, Any]) -> dict[str, Outcome]:
    """The outcomes in one line of the results."""
    return {name: Outcome.from_json(step) for name, step in record["steps"].items()}


def reasons(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was refused and what is wrong, a line each."""
    return [
        f"{record['name']}, {name}: {outcome.status}: {outcome.line}"
        for record in records
        for name, outcome in outcomes_of(record).items()
        if outcome.status in (Status.REFUSED, Status.WRONG)
    ]


def names_in(text: str) -> list[str]:
    """The models that a page lists, in order."""
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    return [row[1].strip().strip("`") for row in rows]


def renewed_in(text: str) -> list[str]:
    """The models that a page says were checked again."""
    line = next((line for line in text.splitlines() if line.startswith(_AGAIN)), "")
    return line.removeprefix(_AGAIN).removesuffix(".").split(", ") if line else []


def results_in(text: str) -> dict[str, dict[str, Any]]:
    """The results that a page shows, by model: what `page` makes the same page of."""
    lines = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    reasons = {f"[{number}]": html.unescape(re.sub(r"\\(.)", r"\1", line)) for number, line in lines.items()}
    found = {}
    for row in (line for line in text.splitlines() if line.startswith("| `")):
        name, kind, _, *cells = (cell.strip() for cell in row.strip("|").split(" | "))
        steps = {step: _outcome(cell, reasons) for step, cell in zip(NAMES, cells, strict=True) if cell != UNKNOWN}
        if len({*cells}) == 1 and cells[0].endswith("]"):  # it was never built
            steps = {"build": steps[NAMES[0]]}
        found[name.strip("`")] = {"name": name.strip("`"), "type": kind, "steps": _as_json(steps)}
    return found


def _as_json(steps: Mapping[str, Outcome]) -> dict[str, Any]:
    return {name: outcome.to_json() for name, outcome in steps.items()}


def _outcome(cell: str, reasons: Mapping[str, str]) -> Outcome:
    sign, _, rest = cell.partition(" ")
    status = next(status for status, other in SIGNS.items() if other == sign)
    line = reasons.get(rest, "")
    if status is not Status.OK:
        return Outcome(status, line)
    noted = {name: 1.0 for name, other in _NOTED.items() if other == line}
    return Outcome(status, numbers=noted or ({"share": min(int(rest.split()[0]) / 100, 0.9999)} if rest else {}))


def _counts(entries: list[Entry], results: Results) -> str:
    checked = [outcomes_of(results[entry.name]) for entry in entries if entry.name in results]
    right = [own for own in checked if "build" not in own and not _any(own, Status.WRONG)]
    types = {entry.type for entry in entries}
    lines = [
        f"\n{len(entries)} models of {len(types)} types, {len(checked)} of them checked: {len(right)} with every"
        f" applicable step right or refused, {sum(_any(own, Status.WRONG) for own in checked)} with a step that is"
        f" wrong, {sum('build' in own for own in checked)} that do not get through transformers itself.\n",
        "\n| step | right | not applicable | refused | wrong |\n|---|---|---|---|---|\n",
    ]
    for name in NAMES:
        count = Counter(own[name].status for own in checked if name in own)
        lines.append(f"| {name} | " + " | ".join(str(count[status]) for status in Status) + " |\n")
    return "".join(lines)


def _any(outcomes: dict[str, Outcome], status: Status) -> bool:
    return any(outcome.status is status for outcome in outcomes.values())


def _table(entries: tuple[Entry, ...], results: Results, notes: _Notes) -> str:
    head = ["model", "type", "dtype", *NAMES]
    lines = [f"| {' | '.join(head)} |\n", "|---" * len(head) + "|\n"]
    for entry in entries:
        record = results.get(entry.name)
        outcomes = outcomes_of(record) if record is not None else {}
        cells = [_cell(outcomes.get(name), outcomes.get("build"), notes) for name in NAMES]
        dtype = str(entry.dtype).removeprefix("torch.")
        lines.append(f"| `{entry.name}` | {entry.type} | {dtype} | {' | '.join(cells)} |\n")
    return "".join(lines)


def _cell(outcome: Outcome | None, build: Outcome | None, notes: _Notes) -> str:
    if outcome is None:
        return f"{SIGNS[build.status]} {notes.number(build.line)}" if build is not None else UNKNOWN
    if outcome.status is Status.OK:
        noted = [notes.number(line) for name, line in _NOTED.items() if name in outcome.numbers]
        if noted:
            return f"{SIGNS[outcome.status]} {noted[0]}"
        share = outcome.numbers.get("share", 1.0)
        return SIGNS[outcome.status] + (f" {100 * share:.0f} %" if share < 1.0 else "")
    return f"{SIGNS[outcome.status]} {notes.number(outcome.line)}"


class _Notes:
    """Reasons, each once, in the order of the cells that need them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, line: str) -> str:
        return f"[{self._numbers.setdefault(line, len(self._numbers) + 1)}]"

    def text(self) -> str:
        lines = [f"{number}. {_escaped(line)}\n" for line, number in self._numbers.items()]
        return "\n## Reasons\n\n" + "".join(lines) if lines else ""


def _escaped(line: str) -> str:
    return line.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _left_out(left_out: Mapping[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"- {reason}: {', '.join(names)}\n" for reason, names in reasons.items()]
    return f"\n## Types of transformers that are not in the zoo: {len(left_out)}\n\n" + "".join(lines)


def write_page(text: str, file: Path = PAGE) -> None:
    """Write the page, with its folder."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
