"""Running a model of somebody else's: whatever it raises becomes one line with the cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import nn

from spectral_surgery.errors import SpectralSurgeryError, TargetError

_RAISED = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
_LONGEST = 240  # characters of a cause


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Turn what a model raises meanwhile into a deliberate error.

    Args:
        model: that is run.

    Raises:
        TargetError: with the cause.
    """
    try:
        yield
    except SpectralSurgeryError:
        raise
    except (*_RAISED, ValueError, StopIteration) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
        raise TargetError(
            f"{type(model).__name__}: cannot be run on token ids and an attention mask alone ({cause}); models that can"
            " are accepted."
        ) from error


def called(model: nn.Module, args: Sequence[Any] = (), named: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """What a model, or a part of one, returns.

    Args:
        model: any.
        args: its arguments by place.
        named: its arguments by name.

    Raises:
        TargetError: with the cause, when it raises an error.
    """
    with running(model):
        return model(*args, **named)
