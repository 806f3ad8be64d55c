"""The steps of the sweep in their order, what each needs, and how one model goes through them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from tests.zoo import adapter_steps, compression_steps, text_steps
from tests.zoo.corpus import Corpus
from tests.zoo.entry import Entry
from tests.zoo.outcome import Numbers, Outcome, Status, attempt, short
from tests.zoo.subject import Subject, prepare


@dataclass(frozen=True)
class Step:
    """A column of the table."""

    name: str
    run: Callable[[Subject], Numbers | None]
    needs: tuple[str, ...] = ()


STEPS = (
    Step("inspect", compression_steps.inspect),
    Step("compress", compression_steps.compress),
    Step("decompress", compression_steps.decompress, ("compress",)),
    Step("load", compression_steps.load_compressed, ("decompress",)),
    Step("generate", compression_steps.generate, ("load",)),
    Step("save again", compression_steps.resave, ("load",)),
    Step("dequantize", compression_steps.dequantize, ("load",)),
    Step("inject", adapter_steps.inject),
    Step("merge", adapter_steps.merge, ("inject",)),
    Step("unmerge", adapter_steps.unmerge, ("merge",)),
    Step("PEFT", adapter_steps.peft, ("inject",)),
    Step("PEFT on compressed", adapter_steps.peft_compressed, ("decompress", "inject")),
    Step("calibrate", text_steps.calibrate),
    Step("heal", text_steps.heal),
    Step("swap", text_steps.swap),
)
NAMES = tuple(step.name for step in STEPS)


def run_steps(subject: Subject, names: Collection[str] = NAMES) -> dict[str, Outcome]:
    """Go through the steps of these names; one whose needs did not end well is not applicable, and says so."""
    done: dict[str, Outcome] = {}
    for step in STEPS:
        if step.name in names:
            done[step.name] = run_step(step, subject, done)
    return done


def run_step(step: Step, subject: Subject, done: dict[str, Outcome]) -> Outcome:
    """One step, after those in ``done``."""
    missing = [need for need in step.needs if need not in done or done[need].status is not Status.OK]
    # what loads wrong is still worth saving: every step shows its own fault
    if missing and not (missing == ["load"] and "outputs" in subject.found):
        return Outcome(Status.NOT_APPLICABLE, f"needs {missing[0]}")
    found = attempt(lambda: step.run(subject))
    return replace(found, line=found.line.replace(f"{subject.folder}/", ""))  # the same text on every machine


def check(entry: Entry, folder: Path, corpus: Corpus) -> dict[str, Outcome]:
    """Everything for one model, in a folder that is emptied before and after."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        subject = prepare(entry, folder, corpus)
    except Exception as error:  # noqa: BLE001 - transformers fails in any way
        return {
            "build": Outcome(Status.NOT_APPLICABLE, short(f"{type(error).__name__}: {error}").replace(f"{folder}/", ""))
        }
    done = run_steps(subject)
    shutil.rmtree(folder, ignore_errors=True)
    return done
