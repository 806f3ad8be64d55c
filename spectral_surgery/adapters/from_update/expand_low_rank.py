"""Weight updates as sums of rank-one matrices: the singular value decomposition, for LoRA and FouRA.

No sum of R rank-one matrices is nearer (Eckart and Young, 1936). FouRA without a gate reaches the same matrices as
LoRA of its rank, since its transforms are orthonormal: its factors are the transformed ones, and its error the same.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapters.foura import FOURA
from spectral_surgery.adapters.from_update.expansion import Expansion, Extractor, count_for, energy_of
from spectral_surgery.adapters.lora import LORA
from spectral_surgery.errors import ConfigError
from spectral_surgery.transforms.fast import FAST

_EXACT = 1024  # shorter side up to which the whole decomposition is computed
_SHARE = 4  # beyond that too, when more than a quarter of the rank is asked for
_FIRST_RANK = 64
_OVERSAMPLING, _ITERATIONS = 16, 3


def expand(delta: Tensor, most: int, enough: float | None, config: Any) -> Expansion:
    """The leading singular triples of a weight update.

    Returns Components with parts ``down`` [K, I] and ``up`` [K, O] whose outer products are the components, balanced:
    both have the norm √s.
    """
    del config
    u, s, vh = _decompose(delta, most, enough)
    gains = s.double().square()
    count = most if enough is None else min(most, count_for(gains, enough))
    root = s[:count].sqrt()[:, None]
    parts = {"down": root * vh[:count], "up": root * u[:, :count].T}
    energy = energy_of(delta)
    return Expansion(energy, energy, gains[:count], gains[:count], parts)


def per_layer(counts: dict[str, int]) -> tuple[int, dict[str, int]]:
    """A number for every layer as PEFT says it: the usual one, and by pattern those of the other layers."""
    usual = Counter(counts.values()).most_common(1)[0][0]
    # the first pattern that fits the end of a name counts: long names before those they may end with
    others = sorted((name for name in counts if counts[name] != usual), key=len, reverse=True)
    return usual, {re.escape(name): counts[name] for name in others}


def _decompose(delta: Tensor, most: int, enough: float | None) -> tuple[Tensor, Tensor, Tensor]:
    shorter = min(delta.shape)
    rank = most if enough is None else min(most, _FIRST_RANK)
    while shorter > _EXACT and rank * _SHARE <= shorter:
        u, s, vh = _sketch(delta, rank)
        if enough is None or rank == most or float(s.double().square().sum()) >= enough:
            return u, s, vh
        rank = min(most, 2 * rank)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u, s, vh


def _sketch(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    # Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1; the same numbers at every call
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(delta.shape[1], rank + _OVERSAMPLING, generator=generator, dtype=delta.dtype)
    basis = torch.linalg.qr(delta @ random.to(delta.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(delta.T @ basis).Q
        basis = torch.linalg.qr(delta @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vh[:rank]


def _foura_tensors(parts: dict[str, Tensor], shape: tuple[int, int], config: Any) -> dict[str, Tensor]:
    del shape
    transform = FAST[config.transform]
    return {"A": transform.forward(parts["down"]), "B": transform.forward(parts["up"]).T.contiguous()}


def _settings(alpha: str, config: Any, counts: dict[str, int]) -> Any:
    """``alpha``: the setting that is divided by the rank; the factor is 1 everywhere."""
    r, pattern = per_layer(counts)
    alphas = {key: float(value) for key, value in pattern.items()}
    return replace(config, r=r, rank_pattern=pattern, alpha_pattern=alphas, **{alpha: float(r)})


def _foura_check(config: Any) -> None:
    if config.transform not in FAST:
        raise ConfigError(
            f"transform: expected {', '.join(FAST)}, got '{config.transform}', whose factors do not reach every"
            " matrix of their rank."
        )
    if config.use_gate:
        raise ConfigError("use_gate: expected false, got true: a weight update is the same for every token.")


LOW_RANK = (
    Extractor(
        method=LORA,
        unit="rank",
        most=min,
        numbers=sum,
        expand=expand,
        tensors=lambda parts, _, __: {"A": parts["down"], "B": parts["up"].T.contiguous()},
        settle=partial(_settings, "lora_alpha"),
    ),
    Extractor(
        method=FOURA,
        unit="rank",
        most=min,
        numbers=sum,
        expand=expand,
        tensors=_foura_tensors,
        settle=partial(_settings, "alpha"),
        check=_foura_check,
    ),
)
