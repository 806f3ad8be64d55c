"""Compressing with text: one block of the model in memory, however deep the model is."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from spectral_surgery.bench.case import Row, require
from spectral_surgery.bench.cases.engine import run_command
from spectral_surgery.bench.language_model import Size, prompt, write_model

DEPTHS = (4, 12)
BESIDES = 500_000_000  # bytes: Python, torch, activations
COPIES = 6  # of a block in float32
_FULL, _QUICK = Size(1024, 2816, 1, 8192), Size(256, 704, 1, 1024)
_TOKENS = 16_384


def run(quick: bool) -> list[Row]:
    """Peak memory of calibrating and of block-wise healing, for a model and one of three times its depth."""
    rows: list[Row] = []
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory() as scratch:
            rows += _rows(Path(scratch), replace(_QUICK if quick else _FULL, layers=depth))
    return rows


def _rows(scratch: Path, size: Size) -> list[Row]:
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
    return [_row("compress --calibrate", size, calibrated), _row("heal --blocks", size, healed)]


def _row(command: str, size: Size, body: dict[str, object]) -> Row:
    block = 4 * (4 * size.hidden**2 + 3 * size.hidden * size.inner)
    peak, limit = int(str(body["peak_rss_bytes"])), COPIES * block + BESIDES
    return {
        "command": command,
        "blocks": size.layers,
        "model in float32, MB": (size.layers * block + 4 * size.words * size.hidden) / 1e6,
        "a block, MB": block / 1e6,
        "peak memory, MB": peak / 1e6,
        "target": f"<= {limit / 1e6:.0f}",
        "met": peak <= limit,
    }
