"""What a user would pick instead: quantisation, pruning and low rank, with every byte counted.

Each baseline is a pure function of a weight matrix. It gives the weight as it would be decoded and
the bytes as they would be stored, so that a comparison at equal bytes is one at equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.registry import Table
from spectral_surgery.spectra.sparse import largest

# NormalFloat levels: quantiles of the normal distribution scaled to [-1, 1], with an exact zero.
# Source: Dettmers et al., QLoRA, arXiv 2305.14314, appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF4_BLOCK = 64
_ABSMAX_BLOCK = 256
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class BaselineResult:
    """A compressed weight.

    Attributes:
        weight: [O, I] float32, as decoded.
        stored_bytes: Codes, scales, zero points, bitmaps and factors.
    """

    weight: Tensor
    stored_bytes: int


@dataclass(frozen=True)
class Baseline:
    """One row of BASELINES.

    Attributes:
        name: How users choose it.
        label: How tables show it.
        apply: ([O, I] floating finite weight, bits per weight or None) to the result. `prune` and
            `svd` need the bits, and never exceed them; the others have a fixed rate and ignore
            them. Raises ShapeError for what is not a matrix, and ConfigError for a weight that is
            not floating and finite or a rate that is missing or too low.
        help: What it stores, in one line.
        budgeted: Whether it needs a rate.
    """

    name: str
    label: str
    apply: Callable[[Tensor, float | None], BaselineResult]
    help: str
    budgeted: bool = False


def int8_rows(weight: Tensor) -> BaselineResult:
    """Round to 8 bits with one float32 scale per row, symmetric.

    Args:
        weight: [O, I] float32.
    """
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (weight / scale).round().clamp(-127, 127)
    return BaselineResult(codes * scale, weight.numel() + 4 * len(weight))


def int_groups(weight: Tensor, *, bits: int, group: int) -> BaselineResult:
    """Round to nearest between the extremes of each group of a row: float16 scale, zero point.

    The zero point is an integer of as many bits as a code, as in common 4-bit checkpoints.

    Args:
        weight: [O, I] float32.
        bits: Of a code.
        group: Weights that share a scale; the last group of a row may be shorter.
    """
    columns = weight.shape[1]
    top = 2**bits - 1
    groups = _blocks(weight, group)  # [O, G, group]
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    high = groups.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / top).clamp(_HALF.smallest_normal, _HALF.max).half().float()
    zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale).round().add(zero).clamp(0, top)
    decoded = ((codes - zero) * scale).flatten(1)[:, :columns]
    count = groups.shape[0] * groups.shape[1]
    stored = _bytes(bits * weight.numel()) + 2 * count + _bytes(bits * count)
    return BaselineResult(decoded, stored)


def nf4(weight: Tensor) -> BaselineResult:
    """NormalFloat of 4 bits in blocks of 64, their maxima quantised to 8 bits in blocks of 256.

    Blocks run over the weight row by row. Counted: codes, 8-bit maxima, one float32 scale for 256
    maxima, one float32 mean. The two constant tables of levels are not.

    Args:
        weight: [O, I] float32.

    Source:
        arXiv 2305.14314; the layout is that of bitsandbytes, with double quantisation.
    """
    blocks = _blocks(weight.reshape(1, -1), _NF4_BLOCK)[0]  # [M, 64]
    peaks = blocks.abs().amax(1)
    codes = _nearest(_divide(blocks, peaks[:, None]), torch.tensor(NF4_LEVELS))
    mean = peaks.mean()
    centred = _blocks((peaks - mean).reshape(1, -1), _ABSMAX_BLOCK)[0]  # [M / 256, 256]
    scale = centred.abs().amax(1, keepdim=True)
    rounded = _nearest(_divide(centred, scale), _dynamic_levels()) * scale
    decoded_peaks = rounded.reshape(-1)[: len(peaks)] + mean
    decoded = (codes * decoded_peaks[:, None]).reshape(-1)[: weight.numel()]
    stored = _bytes(4 * weight.numel()) + len(peaks) + 4 * len(scale) + 4
    return BaselineResult(decoded.reshape(weight.shape), stored)


def prune(weight: Tensor, bits: float) -> BaselineResult:
    """Keep the largest weights as bfloat16 and a bitmap of where they are.

    Args:
        weight: [O, I] float32.
        bits: Budget in bits per weight, above 1.

    Raises:
        ConfigError: If the budget leaves no room for a weight beside the bitmap.
    """
    bitmap = _bytes(weight.numel())
    kept = min((math.floor(bits * weight.numel() / 8) - bitmap) // 2, weight.numel())
    if kept < 1:
        raise ConfigError(
            f"prune: {bits:g} bits per weight cannot hold a bitmap and one value; more than "
            f"{8 * (bitmap + 2) / weight.numel():.4g} is accepted."
        )
    flat = weight.reshape(-1)
    positions = largest(flat.abs(), kept)
    decoded = torch.zeros_like(flat)
    decoded[positions] = flat[positions].bfloat16().float()
    return BaselineResult(decoded.reshape(weight.shape), bitmap + 2 * kept)


def svd(weight: Tensor, bits: float) -> BaselineResult:
    """Keep the largest singular values, as two bfloat16 factors that share them evenly.

    Args:
        weight: [O, I] float32.
        bits: Budget in bits per weight.

    Raises:
        ConfigError: If the budget does not hold one singular value.
    """
    of_one = 2 * sum(weight.shape)
    rank = min(math.floor(bits * weight.numel() / 8) // of_one, *weight.shape)
    if rank < 1:
        raise ConfigError(
            f"svd: {bits:g} bits per weight cannot hold rank 1; at least {8 * of_one / weight.numel():.4g} is accepted."
        )
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    up = (left[:, :rank] * root).bfloat16().float()  # [O, R]
    down = (root[:, None] * right[:rank]).bfloat16().float()  # [R, I]
    return BaselineResult(up @ down, rank * of_one)


def _fixed(method: Callable[[Tensor], BaselineResult]) -> Callable[..., BaselineResult]:
    def apply(weight: Tensor, _bits: float | None) -> BaselineResult:
        return method(_checked(weight))

    return apply


def _budgeted(method: Callable[[Tensor, float], BaselineResult]) -> Callable[..., BaselineResult]:
    def apply(weight: Tensor, bits: float | None) -> BaselineResult:
        if bits is None or not math.isfinite(bits):
            raise ConfigError(
                f"{method.__name__}: no rate to meet ({bits}); finite bits per weight are "
                "accepted. Give those of the compression to compare with."
            )
        return method(_checked(weight), bits)

    return apply


def _checked(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.numel():
        raise ShapeError(
            f"baseline: the weight has shape {tuple(weight.shape)}; a non-empty matrix [O, I] is accepted."
        )
    if not weight.is_floating_point():
        raise ConfigError(f"baseline: the weight is {weight.dtype}; floating ones are accepted.")
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise ConfigError("baseline: the weight is not finite in float32; finite ones are.")
    return wide


def _blocks(x: Tensor, size: int) -> Tensor:
    """[rows, n] to [rows, ceil(n / size), size]; zeros fill the last block, neutral to extremes."""
    short = -x.shape[1] % size
    return torch.nn.functional.pad(x, (0, short)).reshape(x.shape[0], -1, size)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    levels = levels.to(x.device)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, x / scale, 0)


def _dynamic_levels() -> Tensor:
    """[256] levels in [-1, 1]: seven decades, each with twice the levels of the one below.

    Source: Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(decades)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values


def _bytes(bits: int) -> int:
    return -(-bits // 8)


BASELINES = Table(
    "baseline",
    (
        Baseline("int8", "int8 per row", _fixed(int8_rows), "8-bit codes, a float32 scale per row"),
        Baseline(
            "int4-g128",
            "int4 g128",
            _fixed(partial(int_groups, bits=4, group=128)),
            "4-bit codes, a float16 scale and a 4-bit zero point per 128 weights",
        ),
        Baseline(
            "int3-g128",
            "int3 g128",
            _fixed(partial(int_groups, bits=3, group=128)),
            "3-bit codes, a float16 scale and a 3-bit zero point per 128 weights",
        ),
        Baseline(
            "int2-g64",
            "int2 g64",
            _fixed(partial(int_groups, bits=2, group=64)),
            "2-bit codes, a float16 scale and a 2-bit zero point per 64 weights",
        ),
        Baseline(
            "nf4",
            "nf4 g64, double quantisation",
            _fixed(nf4),
            "4-bit NormalFloat codes, an 8-bit maximum per 64 weights",
        ),
        Baseline(
            "prune",
            "magnitude pruning",
            _budgeted(prune),
            "the largest weights in bfloat16 and a bitmap, at the bits per weight given",
            budgeted=True,
        ),
        Baseline(
            "svd",
            "truncated SVD",
            _budgeted(svd),
            "two bfloat16 factors, at the bits per weight given",
            budgeted=True,
        ),
    ),
)

# what people call them when they do not care about groups
SHORT_NAMES = MappingProxyType({"int4": "int4-g128", "int3": "int3-g128", "int2": "int2-g64", "pruning": "prune"})


def baseline(name: str) -> Baseline:
    """A row of BASELINES by its name or short name.

    Raises:
        ConfigError: when there is none.
    """
    return BASELINES[SHORT_NAMES.get(name, name)]
