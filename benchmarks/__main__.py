"""``python -m benchmarks``: run cases, and print their figures."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.case import Inputs
from benchmarks.cases import CASES
from benchmarks.runner import run_cases
from spectral_surgery.cli import output, run
from spectral_surgery.errors import ConfigError
from spectral_surgery.plotting import require_matplotlib

CHECK_FAILED = 3
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("benchmarks", epilog="Cases: " + "; ".join(f"{name}: {case.help}" for name, case in CASES.items()))
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--quick", is_flag=True, help="Smaller inputs, or fewer rows, where a case has them.")
@click.option("--only", metavar="NAME,...", default="", help="Rows of language_model or encoder: 4,calibrated-4,nf4.")
@click.option("--text", type=_FILE, help="Text that language_model and encoder are judged on.")
@click.option("--train-text", type=_FILE, help="Text that language_model and encoder are calibrated and healed on.")
@click.option("--sts", type=_FILE, help="CSV of sentence pairs and scores for encoder, as STS-B has them.")
@click.option("--heal-minutes", type=click.FloatRange(0, min_open=True), help="Add a row of language_model, healed.")
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the models of language_model, encoder, export, speech and generate_large, which stay."
    "  [default: one that is removed]",
)
@click.option(
    "--model",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of a language model to be measured by language_model in place of SmolLM2.",
)
@click.option("--output", "file", type=click.Path(path_type=Path), help="Also write the results as JSON to this file.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the times of mixers over length, or the perplexities of language_model over bits, as PNG.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def command(
    cases: tuple[str, ...],
    quick: bool,
    only: str,
    text: Path | None,
    train_text: Path | None,
    sts: Path | None,
    heal_minutes: float | None,
    scratch: Path | None,
    model: Path | None,
    file: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure: each case first checks its results, then times them beside what else a user could pick.

    A case whose check fails prints FAILED and no numbers, and the exit code is 3. `--help` lists the cases. Without
    names all run but language_model, encoder, export, speech, generate_large, many_tensors and ray, which take long.

    \b
    Example:
      python -m benchmarks coding rate
      python -m benchmarks language_model --only 4,nf4 --text held-out.txt
    """
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    inputs = Inputs(quick, names, text, train_text, sts, heal_minutes, scratch, model)
    if plot:
        require_matplotlib()
    with output.progress(quiet=quiet, unit=" cases") as progress:
        results = run_cases(cases, inputs, progress=progress)
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if plot:
        _draw(results, plot)
    if as_json:
        output.print_json("bench", {"results": results})
    else:
        for result in results:
            click.echo(_text(result))
    if any(result["status"] != "ok" for result in results):
        click.get_current_context().exit(CHECK_FAILED)


def _draw(results: list[dict[str, object]], file: Path) -> None:
    drawn = [name for name, case in CASES.items() if case.plot]
    for result in results:
        draw, rows = CASES[str(result["case"])].plot, result["rows"]
        if draw and isinstance(rows, list) and rows:
            draw(rows, file)
            return
    raise ConfigError(f"--plot: nothing to draw; {', '.join(drawn)} is accepted. Name it among the cases.")


def _text(result: dict[str, object]) -> str:
    title = f"\n{result['case']}: {result.get('help', '')}"
    if result["status"] != "ok":
        return f"{title}\nFAILED: {result.get('reason', '')}"
    rows = result["rows"]
    blocks: list[list[dict[str, object]]] = []
    for row in rows if isinstance(rows, list) else []:
        if blocks and blocks[-1][0].keys() == row.keys():
            blocks[-1].append(row)
        else:
            blocks.append([row])
    notes = result.get("notes")
    said = "\n".join(output.notes(notes if isinstance(notes, list) else []))
    stamp = result.get("stamp", {})
    stamped = ", ".join(f"{key} {value}" for key, value in stamp.items()) if isinstance(stamp, dict) else ""
    return "\n\n".join(filter(None, [title, *map(output.table, blocks), said, stamped]))


if __name__ == "__main__":
    run(command)
