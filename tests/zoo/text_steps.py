"""Steps of the sweep that run a model on text: calibrate, heal, swap."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tests.zoo.compare import distance
from tests.zoo.compression_steps import SMALLEST
from tests.zoo.outcome import NotApplicable, Numbers, command, require, wrong
from tests.zoo.subject import Subject

SAMPLES = "16"
LENGTH, SHORT = "32", "16"  # tokens of a sample
HEAL_STEPS, DISTILL_STEPS = "2", "3"


def _text(subject: Subject) -> None:
    if not subject.entry.text:
        raise NotApplicable("the model takes more than text, or no text")


def _trust(subject: Subject) -> tuple[str, ...]:
    return ("--trust-remote-code",) if subject.entry.own_code else ()


def _length(subject: Subject) -> str:
    return SHORT if subject.entry.short else LENGTH


def calibrate(subject: Subject) -> Numbers:
    """compress --calibrate: something is calibrated, the folder loads to the outputs of its decompressed form."""
    _text(subject)
    folder, text = subject.folder / "calibrated", subject.corpus.text
    rate = ("--bits", "3", "--min-weights", str(SMALLEST), *_trust(subject))
    given = ("--calibrate", text, "--samples", SAMPLES, "--seq-length", _length(subject))
    report, _ = command("compress", subject.source, folder, *rate, *given)
    coverage = report.get("calibration")
    if coverage is None:
        wrong("--json does not say what was calibrated")
    share = _check_coverage(coverage, len(report["tensors"]))
    _loads_as_decompressed(subject, folder)
    return {"calibrated": coverage["matrices"], "of": coverage["of_matrices"], "share": share}


def _check_coverage(coverage: dict[str, Any], tensors: int) -> float:
    """The share of the weights that were calibrated; every tensor counts as calibrated, or is named with a reason."""
    require(coverage["of_matrices"] == tensors, f"{coverage['of_matrices']} tensors in the report, of {tensors}")
    left = coverage["not_calibrated"]
    said = coverage["matrices"] + len(left)
    require(said == tensors, f"of {tensors} tensors {said} are said to be calibrated or not")
    require(all(own["reason"] for own in left), "a tensor is not calibrated, without a reason")
    require(coverage["weights"] > 0, f"exit code 0, and no weight of {tensors} tensors was calibrated")
    return round(coverage["weights"] / max(coverage["of_weights"], 1), 3)


def heal(subject: Subject) -> Numbers:
    """compress --heal: some steps of training, and the folder loads to the outputs of its decompressed form."""
    _text(subject)
    folder, text = subject.folder / "healed", subject.corpus.text
    rate = ("--sparsity", "0.2", "--min-weights", str(SMALLEST), *_trust(subject))
    given = ("--heal", text, "--steps", HEAL_STEPS, "--seq-length", _length(subject))
    _, said = command("compress", subject.source, folder, *rate, *given)
    hit = re.search(r"([\d,]+) coefficients trained", said)
    trained = int(hit[1].replace(",", "")) if hit else 0
    require(trained > 0, "exit code 0, and no coefficient was trained")
    _loads_as_decompressed(subject, folder)
    return {"trained": trained}


def _loads_as_decompressed(subject: Subject, folder: Path) -> None:
    plain = folder.with_name(f"{folder.name}_plain")
    exact = ("--dtype", "float32") if subject.half else ()
    command("decompress", folder, plain, *exact)
    wanted = subject.outputs(subject.load(plain, torch.float32)[0])
    error, where = distance(wanted, subject.outputs(subject.load(folder, torch.float32)[0]))
    require(error <= 1e-4, f"outputs of the folder and of its decompressed form differ by {error:.2g} in {where}")


def swap(subject: Subject) -> Numbers:
    """Attention of the first layer for a mixer: loads whole, and once more after save_pretrained."""
    if not subject.entry.mixer:
        raise NotApplicable("swap is tried on a few families, which it names")
    folder, again = subject.folder / "swapped", subject.folder / "swapped_again"
    given: tuple[str | Path, ...] = ("--mixer", subject.entry.mixer, "--layers", "0", *_trust(subject))
    if subject.entry.text:
        given += ("--distill", subject.corpus.text, "--steps", DISTILL_STEPS, "--seq-length", SHORT)
    command("swap", subject.source, folder, *given)
    model, keys = subject.load(folder)
    require(not keys, f"loads with {keys}")
    found = subject.outputs(model)
    require(all(bool(x.isfinite().all()) for x in found.values()), "outputs that are not finite")
    model.save_pretrained(again)
    error, where = distance(found, subject.outputs(subject.load(again)[0]))
    require(error <= 1e-6, f"saved and loaded again, outputs differ by {error:.2g} in {where}")
    return {"changed": distance(subject.first, found)[0]}
