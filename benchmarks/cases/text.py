"""Compressing with text: one block of the model in memory, however deep the model is."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.case import Row, require
from benchmarks.cases.engine import run_command
from benchmarks.language_model import Size, prompt, write_model

DEPTHS, QUICK_DEPTHS = (1, 3), (4, 12)
BESIDES = 500_000_000  # bytes: Python, torch, transformers, activations
COPIES = 6  # of a block in float32
_FULL, _QUICK = Size(2048, 5632, 1, 8192), Size(256, 704, 1, 1024)  # the libraries alone are 0.8 GB
_TINY = Size(64, 128, 1, 128)  # what Python and the libraries take
_TOKENS = 16_384


def run(quick: bool) -> list[Row]:
    """Peak memory of calibrating and of block-wise healing, for a model and one of three times its depth."""
    rows: list[Row] = []
    alone: dict[str, float] = {}
    whole, depths = (_QUICK, QUICK_DEPTHS) if quick else (_FULL, DEPTHS)
    for size in (_TINY, *(replace(whole, layers=depth) for depth in depths)):
        with tempfile.TemporaryDirectory() as scratch:
            peaks = _peaks(Path(scratch), size)
        alone = alone or peaks
        rows += [_row(command, size, peak, alone[command]) for command, peak in peaks.items() if size is not _TINY]
    return rows


def _peaks(scratch: Path, size: Size) -> dict[str, float]:
    """Peak memory in bytes of each command."""
    source, sparse = write_model(scratch / "source", size), scratch / "sparse"
    text = scratch / "text.txt"
    text.write_text(prompt(_TOKENS, size.words), encoding="utf-8")
    shape = ("--include", "*proj*")
    given = ("--samples", "32", "--seq-length", "256")
    calibrated = run_command(
        "compress", str(source), str(scratch / "out"), "--bits", "3", "--calibrate", str(text), *given, *shape
    )
    shutil.rmtree(scratch / "out")
    run_command("compress", str(source), str(sparse), "--sparsity", "0.2", *shape)
    few = ("--steps", "2", "--batch-size", "4", "--seq-length", "256")
    healed = run_command(
        "heal", str(sparse), str(source), str(scratch / "healed"), "--data", str(text), "--blocks", *few
    )
    require(int(str(healed["trained_weights"])) == 7 * size.layers, "heal --blocks left weights out")
    return {
        command: float(str(body["peak_rss_bytes"]))
        for command, body in (("compress --calibrate", calibrated), ("heal --blocks", healed))
    }


def _row(command: str, size: Size, peak: float, alone: float) -> Row:
    block = 4 * (4 * size.hidden**2 + 3 * size.hidden * size.inner)
    limit = COPIES * block + BESIDES
    return {
        "command": command,
        "blocks": size.layers,
        "model in float32, MB": (size.layers * block + 4 * size.words * size.hidden) / 1e6,
        "a block, MB": block / 1e6,
        "of a tiny model, MB": alone / 1e6,
        "peak memory, MB": peak / 1e6,
        "beyond the tiny one, in blocks": (peak - alone) / block,
        "target": f"<= {limit / 1e6:.0f}",
        "met": peak <= limit,
    }
