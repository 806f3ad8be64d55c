"""What a mixer is: a module that lets tokens see each other, in place of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from spectral_surgery.errors import CausalityError, ConfigError, ShapeError
from spectral_surgery.mixers.cache import MixerCache


@runtime_checkable
class Mixer(Protocol):
    """A map from token sequences to token sequences; implemented by `nn.Module`s.

    ``is_causal``: whether an output depends on no later token, bit for bit.
    """

    is_causal: bool
    width: int

    def __call__(self, x: Tensor, mask: Tensor | None = None, cache: MixerCache | None = None) -> Tensor:
        """Mix tokens; modules implement it as `forward`.

        Returns [B, T, D] in the dtype of x, zero at padding; transforms are computed in float32.

        Args:
            x: [B, T, D], any float dtype.
            mask: [B, T], zero or False at padding, which may be left, right or between; None for none. A sequence gives
                what it gives alone without its padding.
            cache: from `new_cache`: x then continues the sequences seen before, and the cache is updated.

        Raises:
            ShapeError: when x is not [B, T, D] with at least one token, or mask or cache do not fit it.
            CausalityError: for a cache given to a mixer that is not causal.
        """
        ...

    def new_cache(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerCache:
        """An empty cache for decoding. Raises CausalityError when the mixer is not causal."""
        ...


ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class MixerMethod(Generic[ConfigT]):
    """A row of MIXERS.

    Attributes:
        config: frozen dataclass of its settings; the help text of a field is its metadata["help"].
        build: (settings, D) -> a fresh mixer.
        is_causal: whether it may stand in a model that generates from left to right.
        counterpart: name of the row that does the same in the other direction of `is_causal`.
    """

    name: str
    config: type[ConfigT]
    build: Callable[[ConfigT, int], nn.Module]
    is_causal: bool
    counterpart: str
    source: str

    def fresh(self, width: int, settings: dict[str, Any] | None = None) -> nn.Module:
        """A mixer with the default settings, or some of them changed.

        Raises ConfigError for a setting that is unknown or out of range.
        """
        known = set(self.config.__dataclass_fields__)  # type: ignore[attr-defined]
        unknown = sorted(set(settings or {}) - known)
        if unknown:
            raise ConfigError(
                f"{self.name}: expected settings among {', '.join(sorted(known)) or 'none'}, got {unknown[0]!r}. "
                "Leave it out."
            )
        return self.build(self.config(**(settings or {})), width)


def require_range(where: str, value: float, low: float, high: float | None = None) -> None:
    """Accept a setting between two bounds. Raises ConfigError when it is outside."""
    if value < low or (high is not None and value > high):
        accepted = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
        raise ConfigError(f"{where}: expected {accepted}, got {value:g}.")


def require_heads(heads: int, width: int) -> None:
    """Accept a number of heads that divides the width. Raises ConfigError when it does not."""
    if heads < 1 or width % heads:
        raise ConfigError(f"heads: expected a divisor of the width, {width}, got {heads}. Use 1 or another divisor.")


def require_tokens(x: Tensor, width: int, mask: Tensor | None) -> None:
    """Accept [B, T, D] and a mask that fits. Raises ShapeError when they do not."""
    if x.ndim != 3 or not x.numel() or x.shape[-1] != width or not x.is_floating_point():
        raise ShapeError(
            f"mixer: expected floating x [B, T, {width}] with at least one sequence and one token, got"
            f" {tuple(x.shape)} {x.dtype}."
        )
    if mask is not None and mask.shape != x.shape[:2]:
        raise ShapeError(f"mixer: expected a mask {tuple(x.shape[:2])} for this x, got {tuple(mask.shape)}.")


def refuse_cache(mixer: str) -> NoReturn:
    """Say that a mixer cannot decode. Raises CausalityError always."""
    raise CausalityError(
        f"{mixer}: expected a causal mixer to decode with a cache, got one that looks at later tokens. Use its"
        " causal counterpart."
    )
