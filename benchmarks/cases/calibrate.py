"""What each part of calibration is worth: all-MiniLM-L6-v2 with the parts switched off or on one by one."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.calibration_lab import Laboratory, Outcome, Parts
from benchmarks.case import Row, require

_OWN = Parts()
VARIANTS: tuple[tuple[str, Parts], ...] = (
    ("as compress --calibrate does", _OWN),
    ("without error feedback", replace(_OWN, feedback=False)),
    ("without the transform", replace(_OWN, transform="identity")),
    ("inputs of the original blocks", replace(_OWN, own_inputs=False)),
    ("damping 0.01", replace(_OWN, damping=0.01)),
    ("damping 0.2", replace(_OWN, damping=0.2)),
    ("equal rates", replace(_OWN, spread=False)),
    ("one step for all columns", replace(_OWN, column_steps=False)),
    ("the step refitted", replace(_OWN, refitted=True)),
    ("rows and columns rescaled", replace(_OWN, rescaled=True)),
    ("inputs and residuals compensated", replace(_OWN, compensated=True)),
    ("tokens weighted", replace(_OWN, weighted=True)),
)
_BITS, _QUICK_BLOCKS, _QUICK_PASSAGES = 2.0, 1, 64
_NEAR = 0.01  # of the asked rate


def run(quick: bool) -> list[Row]:
    """Bits, error and cosine at 2 bits, for the blocks of the encoder (for the first one, if quick)."""
    blocks, passages = (_QUICK_BLOCKS, _QUICK_PASSAGES) if quick else (None, 512)
    laboratory = Laboratory(blocks=blocks, passages=passages)
    outcomes = [(name, laboratory.trial(parts, _BITS)) for name, parts in VARIANTS]
    first = outcomes[0][1]
    require(abs(first.bits / _BITS - 1) < _NEAR, f"the rate is {first.bits:.3f}, not {_BITS}")
    plain = next(outcome for name, outcome in outcomes if name == "without error feedback")
    require(first.error < plain.error, "error feedback makes outputs worse")
    return [_row(name, outcome, first) for name, outcome in outcomes]


def _row(name: str, outcome: Outcome, first: Outcome) -> Row:
    return {
        "calibration": name,
        "bits_per_weight": outcome.bits,
        "output error": outcome.error,
        "cosine": outcome.cosine,
        "distance to the original": (1 - outcome.cosine) / (1 - first.cosine),
        "seconds": outcome.seconds,
    }
