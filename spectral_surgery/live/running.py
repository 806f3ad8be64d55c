"""Running a model of somebody else's, forward and backward: whatever it raises becomes one line with the cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import SpectralSurgeryError, TargetError
from spectral_surgery.matmul.dispatch import processor

_RAISED = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
_LONGEST = 240  # characters of a cause


def fast_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on a type of device."""
    return processor().bfloat16 if device == "cpu" else torch.cuda.is_bf16_supported()


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Turn what a model raises meanwhile into a deliberate error. Raises TargetError with the cause."""
    try:
        yield
    except SpectralSurgeryError:
        raise
    except (*_RAISED, ValueError, StopIteration) as error:
        raise TargetError(
            f"{type(model).__name__}: expected a model that runs on token ids and an attention mask alone, got"
            f" {_cause(error)}."
        ) from error


@contextmanager
def differentiating(loss: Tensor) -> Iterator[None]:
    """Turn what the gradients of a loss raise meanwhile into a deliberate error."""
    if not loss.requires_grad:
        raise not_differentiable("they are computed under torch.no_grad")
    try:
        yield
    except _RAISED as error:
        raise not_differentiable(_cause(error)) from error


def not_differentiable(cause: str) -> TargetError:
    """The error for a model that gives no gradients."""
    return TargetError(
        f"heal: expected a model that autograd can follow, got no gradients for its weights ({cause}). Compress it"
        " without healing."
    )


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]


def called(model: nn.Module, args: Sequence[Any] = (), named: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """What a model, or a part of one, returns."""
    with running(model):
        return model(*args, **named)
