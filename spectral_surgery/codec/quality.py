"""Fidelity and size of a compressed tensor: measured against the original, every byte counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, DomainError, ShapeError


def relative_error(reference: Tensor, actual: Tensor) -> float:
    """Return the Frobenius norm of `actual` - `reference` over that of `reference`.

    Zero for two zero tensors, infinite where only the reference is zero. Norms are summed in
    float64.

    Args:
        reference: The original, any shape and floating dtype.
        actual: The approximation, same shape; dtypes may differ.

    Raises:
        DomainError: If an argument is not a tensor.
        ShapeError: If the shapes differ.
    """
    _check("relative_error", reference, actual)
    wide = torch.promote_types(torch.promote_types(reference.dtype, actual.dtype), torch.float32)
    return _ratio(_norm(actual.to(wide) - reference.to(wide)), _norm(reference))


def energy_kept(reference: Tensor, actual: Tensor) -> float:
    """Return the squared norm of `actual` over that of `reference`.

    Where `actual` only lacks orthonormal coefficients of `reference`, this is
    1 - relative_error^2 (Parseval). One for two zero tensors.

    Args:
        reference: The original, any shape and floating dtype.
        actual: The approximation, same shape; dtypes may differ.

    Raises:
        DomainError: If an argument is not a tensor.
        ShapeError: If the shapes differ.
    """
    _check("energy_kept", reference, actual)
    original, kept = _norm(reference), _norm(actual)
    return 1.0 if original == kept == 0 else _ratio(kept, original) ** 2


def snr_db(reference: Tensor, actual: Tensor) -> float:
    """Return the signal-to-noise ratio in decibels, -20 log10(relative_error); inf when exact.

    Args:
        reference: The original, any shape and floating dtype.
        actual: The approximation, same shape; dtypes may differ.

    Raises:
        DomainError: If an argument is not a tensor.
        ShapeError: If the shapes differ.
    """
    _check("snr_db", reference, actual)
    error = relative_error(reference, actual)
    return -20 * math.log10(error) if error else math.inf


def bits_per_weight(stored_bytes: int, weights: int) -> float:
    """Return stored bits per weight; `stored_bytes` counts everything that is written.

    Raises ConfigError if there are no weights, or a negative number of bytes.
    """
    if weights < 1 or stored_bytes < 0:
        raise ConfigError(
            f"bits_per_weight: {stored_bytes} bytes for {weights} weights; expected bytes of 0 or more and at least one"
            " weight."
        )
    return 8 * stored_bytes / weights


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return math.inf if part else 0.0
    return part / whole


def _check(where: str, reference: Tensor, actual: Tensor) -> None:
    for name, x in (("reference", reference), ("actual", actual)):
        if not isinstance(x, Tensor):
            raise DomainError(
                f"{where}: {name} is a {type(x).__name__}; expected tensors. Bring a spectrum back to space first, with"
                " to_spatial() or to_dense()."
            )
    if reference.shape != actual.shape:
        raise ShapeError(
            f"{where}: shapes {tuple(reference.shape)} and {tuple(actual.shape)} differ; expected equal shapes."
        )
