"""Bits and error on real weights, beside what else a user could pick at the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from operator import add

from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.weights import linear_weights
from spectral_surgery.baselines import BASELINES
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis, EncodingReport
from spectral_surgery.codec.rate import Target
from spectral_surgery.transforms import TRANSFORMS

ERRORS = {
    "lattice": {4.0: 0.0689, 3.0: 0.137, 2.4: 0.2075, 2.0: 0.274, 1.5: 0.390, 1.0: 0.559},
    "scalar": {4.0: 0.080, 3.0: 0.160, 2.4: 0.238, 2.0: 0.315, 1.0: 0.63},
}
FIXED = ("int8", "nf4", "int4-g128", "int3-g128", "int2-g64")
BUDGETED = ("prune", "svd")
_THREADS = 2


def run(quick: bool) -> list[Row]:  # noqa: ARG001 - it is quick
    """Every asked rate, `--sparsity 0.2`, and the baselines, sorted by bits."""
    weights = linear_weights()
    rows = [
        _ours(weights, Target("bits", bits), error, name)
        for name, errors in ERRORS.items()
        for bits, error in errors.items()
    ]
    rows.append(_ours(weights, Target("density", 0.2), 0.592))
    rows += [_baseline(weights, name, None) for name in FIXED]
    rows += [_baseline(weights, name, bits) for name in BUDGETED for bits in (4.0, 3.0, 2.0)]
    return sorted(rows, key=lambda row: -float(str(row["bits_per_weight"])))


def run_tiles(quick: bool) -> list[Row]:  # noqa: ARG001 - as every case
    """Every transform with tiles of 32, 64 and 128 at 3 bits."""
    weights = linear_weights()
    rows: list[Row] = []
    for name in TRANSFORMS:
        for tile in (32, 64, 128):
            report = measure(weights, Target("bits", 3.0), Basis(name, tile))
            rows.append(
                {
                    "transform": name,
                    "tile": tile,
                    "bits_per_weight": report.bits_per_weight,
                    "relative_error": report.relative_error,
                }
            )
    return rows


def measure(
    weights: Mapping[str, Tensor], target: Target, basis: Basis | None = None, quantizer: str | None = None
) -> EncodingReport:
    """Encode all weights and check that the decoded matrices have the reported error."""
    reports = []
    for name, weight in weights.items():
        encoded, report = encode(weight, target, basis, quantizer=quantizer, threads=_THREADS)
        error = float((encoded.to_dense(threads=_THREADS) - weight).norm() / weight.norm())
        require(abs(error - report.relative_error) < 1e-3 * error, f"{name}: error {error} where {report} is reported")
        reports.append(report)
    return reduce(add, reports)


def _ours(weights: Mapping[str, Tensor], target: Target, limit: float, quantizer: str = "scalar") -> Row:
    report = measure(weights, target, quantizer=quantizer)
    if target.kind == "bits":
        on_rate = abs(report.bits_per_weight / target.value - 1) <= 0.01
        aim = f"error <= {limit:g}, bits within 1 %"
    else:
        on_rate = abs(report.density - target.value) <= 0.001 and report.bits_per_weight <= 1.45
        aim = f"error <= {limit:g}, density +- .001, bits <= 1.45"
    return {
        "method": f"spectral, {quantizer}, {target.kind} {target.value:g}",
        "bits_per_weight": report.bits_per_weight,
        "relative_error": report.relative_error,
        "bits above 2^-R": report.bits_per_weight + math.log2(report.relative_error),
        "density": report.density,
        "target": aim,
        "met": on_rate and report.relative_error <= limit,
    }


def _baseline(weights: Mapping[str, Tensor], name: str, bits: float | None) -> Row:
    stored, lost, energy = 0, 0.0, 0.0
    for weight in weights.values():
        result = BASELINES[name].apply(weight, bits)
        stored += result.stored_bytes
        lost += float((weight - result.weight).double().square().sum())
        energy += float(weight.double().square().sum())
    count = sum(weight.numel() for weight in weights.values())
    return {
        "method": BASELINES[name].label,
        "bits_per_weight": 8 * stored / count,
        "relative_error": (lost / energy) ** 0.5,
        "bits above 2^-R": "",
        "density": "",
        "target": "",
        "met": "",
    }
