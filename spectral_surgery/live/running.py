"""Running a model of somebody else's, forward and backward: whatever it raises becomes one line with the cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spectral_surgery.errors import SpectralSurgeryError, TargetError
from spectral_surgery.matmul.dispatch import processor

_RAISED = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
_LONGEST = 240  # characters of a cause
_WORDS = {
    "input_ids": "token ids",
    "attention_mask": "an attention mask",
    "decoder_input_ids": "what its decoder reads",
    "pixel_values": "an image",
    "input_features": "a sound",
    "input_values": "a sound",
    "hidden_states": "hidden states",
}
_TEXT = ("input_ids", "attention_mask")


def fast_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on a type of device."""
    return processor().bfloat16 if device == "cpu" else torch.cuda.is_bf16_supported()


@contextmanager
def running(model: nn.Module, given: Iterable[str] = _TEXT) -> Iterator[None]:
    """Turn what a model raises meanwhile into a deliberate error. Raises TargetError with the cause.

    Args:
        given: names of what it is run on.
    """
    try:
        yield
    except SpectralSurgeryError:
        raise
    except (*_RAISED, ValueError, StopIteration) as error:
        *words, last = [_WORDS[name] for name in _WORDS if name in given] or [", ".join(given)]
        what = f"{', '.join(words)} and {last}" if words else last
        raise TargetError(
            f"{type(model).__name__}: expected a model that runs on {what} alone, got {_cause(error)}."
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
    states = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
    with running(model, ("hidden_states",) if states else named or _TEXT):
        return model(*args, **named)
