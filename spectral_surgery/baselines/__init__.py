"""What a user would pick instead: quantisation, pruning and low rank, with every byte counted.

Each baseline is a pure function of a weight matrix, and of its inputs where it is calibrated. It gives the weight as it
would be decoded and the bytes as they would be stored, so that a comparison at equal bytes is one at equal bytes.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

from spectral_surgery.baselines.base import Baseline, BaselineResult
from spectral_surgery.baselines.gptq import gptq
from spectral_surgery.baselines.hqq import hqq
from spectral_surgery.baselines.low_rank import svd
from spectral_surgery.baselines.prune import prune
from spectral_surgery.baselines.rounding import int8_rows, int_groups, nf4
from spectral_surgery.baselines.sparsegpt import sparsegpt
from spectral_surgery.baselines.wanda import wanda
from spectral_surgery.registry import Table

__all__ = ["BASELINES", "SHORT_NAMES", "Baseline", "BaselineResult", "baseline"]


def _nearest(bits: int, group: int) -> Baseline:
    return Baseline(
        f"int{bits}-g{group}",
        f"int{bits} g{group}",
        "int",
        partial(int_groups, bits=bits, group=group),
        f"{bits}-bit codes, a float16 scale and a {bits}-bit zero point per {group} weights",
    )


def _hqq(bits: int) -> Baseline:
    return Baseline(
        f"hqq{bits}",
        f"HQQ int{bits} g64",
        "hqq",
        partial(hqq, bits=bits),
        f"{bits}-bit codes, a float16 scale and a float16 zero point per 64 weights. mobiusml.github.io/hqq_blog",
    )


def _gptq(bits: int, without_inputs: str) -> Baseline:
    return Baseline(
        f"gptq{bits}",
        f"GPTQ int{bits} g128",
        "gptq",
        partial(gptq, bits=bits),
        f"{bits}-bit codes, a float16 scale and a {bits}-bit zero point per 128 weights; needs text. arXiv 2210.17323",
        without_inputs=without_inputs,
    )


BASELINES = Table(
    "baseline",
    (
        Baseline("int8", "int8 per row", "int", int8_rows, "8-bit codes, a float32 scale per row"),
        _nearest(4, 128),
        _nearest(3, 128),
        _nearest(2, 64),
        Baseline(
            "nf4",
            "nf4 g64, double quantisation",
            "nf4",
            nf4,
            "4-bit NormalFloat codes, an 8-bit maximum per 64 weights",
        ),
        _hqq(4),
        _hqq(3),
        _hqq(2),
        _gptq(4, "int4-g128"),
        _gptq(3, "int3-g128"),
        _gptq(2, "int2-g64"),
        Baseline(
            "prune",
            "magnitude pruning",
            "prune",
            prune,
            "the largest weights in bfloat16 and a bitmap, at the bits per weight given",
            budgeted=True,
            above=1.0,
        ),
        Baseline(
            "wanda",
            "Wanda",
            "wanda",
            wanda,
            "weights in bfloat16 and a bitmap, at the bits per weight given; needs text. arXiv 2306.11695",
            budgeted=True,
            above=1.0,
            without_inputs="prune",
        ),
        Baseline(
            "sparsegpt",
            "SparseGPT",
            "sparsegpt",
            sparsegpt,
            "weights in bfloat16 and a bitmap, at the bits per weight given; needs text. arXiv 2301.00774",
            budgeted=True,
            above=1.0,
            without_inputs="prune",
        ),
        Baseline(
            "svd", "truncated SVD", "svd", svd, "two bfloat16 factors, at the bits per weight given", budgeted=True
        ),
    ),
)

# what people call them when they do not care about groups
SHORT_NAMES = MappingProxyType({"int4": "int4-g128", "int3": "int3-g128", "int2": "int2-g64", "pruning": "prune"})


def baseline(name: str) -> Baseline:
    """A row of BASELINES by its name or short name. Raises ConfigError when there is none."""
    return BASELINES[SHORT_NAMES.get(name, name)]
