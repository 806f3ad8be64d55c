"""Places of trained coefficients in a spectrum, as a buffer that is stored with them and checked when it is loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import CheckpointError, ConfigError


def check_count(n_frequency: int, most: int, shape: tuple[int, int]) -> None:
    """Refuse a number of coefficients that a layer does not have. Raises ConfigError when it is not in 1 .. most."""
    if not 0 < n_frequency <= most:
        raise ConfigError(
            f"n_frequency: expected 1 to {most} for a layer of {shape[0]} x {shape[1]}, got {n_frequency}. Change"
            " n_frequency, or n_frequency_pattern for some layers."
        )


def register_positions(module: nn.Module, positions: Tensor, shape: tuple[int, int]) -> None:
    """Give a module the buffer ``positions``: int32, or int64 for 2^31 places and more.

    Args:
        module: to hold it; loading a state dict with other places than increasing ones of the spectrum raises
            CheckpointError.
        positions: [K] integers, row * I + column, strictly increasing.

    Raises:
        CheckpointError: when they are none.
    """
    count = shape[0] * shape[1]
    module.register_buffer("positions", positions.to(torch.int32 if count < 1 << 31 else torch.int64))
    check = partial(_check, count=count)
    check(module)
    module.register_load_state_dict_post_hook(check)


def _check(module: nn.Module, _: Any = None, *, count: int) -> None:
    positions = module.get_buffer("positions")
    if positions.is_meta:
        return
    increasing = bool((positions[1:] > positions[:-1]).all())
    if not (increasing and int(positions[0]) >= 0 and int(positions[-1]) < count):
        raise CheckpointError(
            f"positions: expected increasing places of a spectrum from 0 to {count - 1}, each at most once, got"
            f" {positions[:4].tolist()}.... Write the adapter again."
        )
