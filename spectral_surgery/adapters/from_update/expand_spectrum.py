"""Weight updates as sums of frequencies: for SpectralDelta, and the cosine half of them for FourierFT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapters.fourierft import FOURIERFT, random_positions
from spectral_surgery.adapters.fourierft_biased import FOURIERFT_BIASED, basis_functions
from spectral_surgery.adapters.from_update.expand_low_rank import per_layer
from spectral_surgery.adapters.from_update.expansion import Expansion, Extractor, count_for, energy_of
from spectral_surgery.adapters.spectral_delta import SPECTRAL_DELTA
from spectral_surgery.errors import ConfigError
from spectral_surgery.sparse.tensor import largest
from spectral_surgery.transforms.fast import FAST


def expand_delta(delta: Tensor, most: int, enough: float | None, config: Any) -> Expansion:
    """The largest coefficients of an orthonormal transform of both axes.

    Returns Components with parts ``values`` and ``positions``; nothing is out of reach.
    """
    coefficients = FAST[config.transform].forward2(delta).reshape(-1)
    gains = coefficients.double().square()
    energy = float(gains.sum())
    chosen = _best(gains, most, enough)
    parts = {"values": coefficients[chosen] / config.scaling, "positions": chosen}
    return Expansion(energy, energy, gains[chosen], gains[chosen], parts)


def expand_cosines(delta: Tensor, most: int, enough: float | None, config: Any) -> Expansion:
    """The largest coefficients of FourierFT's basis, the functions cos(2 pi (p j / O + q k / I)), at any places.

    They span the matrices with ΔW[p, q] = ΔW[-p, -q]: half of the space, and half of the energy of a generic update.
    Returns Components with parts ``values`` and ``positions``.
    """
    values, gains = _cosines(delta)
    rows, columns = delta.shape
    half = gains.shape[1]
    first = _first_of_mirrors(rows, columns)
    reach = float(gains[first].sum())
    gains[~first] = -1.0  # the same function as another place
    flat = gains.reshape(-1)
    chosen = _best(flat, min(most, int(first.sum())), enough)
    positions = chosen // half * columns + chosen % half
    parts = {"values": values.reshape(-1)[chosen] / config.scaling, "positions": positions}
    return Expansion(energy_of(delta), reach, flat[chosen], flat[chosen], parts)


def expand_random(delta: Tensor, most: int, enough: float | None, config: Any) -> Expansion:
    """FourierFT's coefficients at the places that PEFT draws, in the order in which it draws them.

    Returns Components with parts ``values`` and ``functions``, which tells places with the same basis function.
    """
    rows, columns = delta.shape
    values, gains = _cosines(delta)
    half = gains.shape[1]
    positions = random_positions(delta.numel(), most, config.random_loc_seed)
    row, column = positions // columns, positions % columns
    beyond = (column >= half) | ~_first_of_mirrors(rows, columns)[row, column.clamp_max(half - 1)]
    row, column = torch.where(beyond, -row % rows, row), torch.where(beyond, -column % columns, column)
    functions = row * half + column
    gain = gains.reshape(-1)[functions]
    gain[~_first_seen(functions)] = 0.0
    count = most if enough is None else count_for(gain, enough)
    reach = float(gains[_first_of_mirrors(rows, columns)].sum())
    order = torch.full((count,), reach / delta.numel(), dtype=torch.float64)
    parts = {"values": values.reshape(-1)[functions[:count]] / config.scaling, "functions": functions[:count]}
    return Expansion(energy_of(delta), reach, gain[:count], order, parts)


def _cosines(delta: Tensor) -> tuple[Tensor, Tensor]:
    """([O, I // 2 + 1] coefficients for scaling 1, float64 energies) of the places in half of the spectrum."""
    rows, columns = delta.shape
    real = torch.fft.rfft2(delta).real
    # a pair of mirrored places is one function; a self-mirrored place has twice the norm
    twice = torch.full(real.shape, 2.0, device=delta.device)
    middle_rows = [0, rows // 2] if rows % 2 == 0 else [0]
    middle_columns = [0, columns // 2] if columns % 2 == 0 else [0]
    for row in middle_rows:
        twice[row, middle_columns] = 1.0
    return twice * real, (twice * real).double() * real / delta.numel()


def _first_of_mirrors(rows: int, columns: int) -> Tensor:
    """[O, I // 2 + 1] bool: one of every two places (j, k) and (-j, -k)."""
    half = columns // 2 + 1
    first = torch.ones(rows, half, dtype=torch.bool)
    ends = [0, columns // 2] if columns % 2 == 0 else [0]
    first[rows // 2 + 1 :, ends] = False
    return first


def _first_seen(ids: Tensor) -> Tensor:
    """[K] bool: whether no earlier entry is the same."""
    ordered, order = ids.sort(stable=True)
    first = torch.ones(len(ids), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    seen = torch.empty_like(first)
    seen[order] = first
    return seen


def _best(gains: Tensor, most: int, enough: float | None) -> Tensor:
    """Places of the largest energies, the largest first; equal ones in order of their places."""
    count = most
    if enough is not None:
        count = min(most, count_for(gains.clamp_min(0).sort(descending=True).values, enough))
    chosen = largest(gains, count)
    return chosen[gains[chosen].argsort(descending=True, stable=True)]


def _placed(parts: dict[str, Tensor], shape: tuple[int, int], config: Any) -> dict[str, Tensor]:
    del config
    positions, order = parts["positions"].sort()
    integer = torch.int32 if shape[0] * shape[1] < 1 << 31 else torch.int64
    return {"spectrum": parts["values"][order], "positions": positions.to(integer)}


def _shared(parts: dict[str, Tensor], shape: tuple[int, int], config: Any) -> dict[str, Tensor]:
    del shape, config
    _, which, counts = torch.unique(parts["functions"], return_inverse=True, return_counts=True)
    return {"spectrum": parts["values"] / counts[which]}  # two places of one function share its coefficient


def _settings(config: Any, counts: dict[str, int]) -> Any:
    usual, pattern = per_layer(counts)
    return replace(config, n_frequency=usual, n_frequency_pattern=pattern)


def _check(config: Any) -> None:
    if config.scaling == "auto" or not config.scaling:
        raise ConfigError(
            f"scaling: expected a number other than 0, got {config.scaling}: coefficients are divided by it."
        )


def _place_bytes(shape: tuple[int, int]) -> int:
    return 4 if shape[0] * shape[1] < 1 << 31 else 8


SPECTRAL = (
    Extractor(
        method=SPECTRAL_DELTA,
        unit="n_frequency",
        most=lambda shape: shape[0] * shape[1],
        place_bytes=_place_bytes,
        expand=expand_delta,
        tensors=_placed,
        settle=_settings,
        check=_check,
    ),
    Extractor(
        method=FOURIERFT,
        unit="n_frequency",
        most=lambda shape: shape[0] * shape[1],
        expand=expand_random,
        tensors=_shared,
        settle=_settings,
        check=_check,
    ),
    Extractor(
        method=FOURIERFT_BIASED,
        unit="n_frequency",
        most=basis_functions,
        place_bytes=_place_bytes,
        expand=expand_cosines,
        tensors=_placed,
        settle=_settings,
        check=_check,
    ),
)
