"""Does the future reach the past? Asked of the module itself, since "causal" is easily said."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spectral_surgery.errors import CausalityError

_LOUD = 1e3  # times the tokens replaced, so that even rounding noise of a leak shows


@dataclass(frozen=True)
class Leak:
    """What changed when tokens were replaced.

    Attributes:
        before: largest change of an output before the first replaced token; exactly 0 when causal.
        after: largest change of another output; 0 means that nothing was tested.
    """

    before: float
    after: float


def leak(
    mixer: nn.Module, width: int, tokens: int = 300, cuts: Sequence[int] = (1, 7, 64, 150, 257, 299), seed: int = 0
) -> Leak:
    """Randomise all parameters of a copy, replace the tokens from each cut on, and compare outputs bit for bit.

    Random parameters matter: gates that start constant would hide a leak through the pooled context.

    Args:
        mixer: maps [1, T, D] to [1, T, D]; not changed.
        cuts: first replaced tokens; those beyond T are not used.
    """
    copied = copy.deepcopy(mixer).eval()
    generator = torch.Generator().manual_seed(seed)
    before, after = [], []
    with torch.no_grad():
        for parameter in copied.parameters():
            drawn = 0.5 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.to(parameter))
        where = next(copied.parameters(), torch.empty(0))
        x = torch.randn(1, tokens, width, generator=generator).to(where)
        y = copied(x)
        for cut in (cut for cut in cuts if cut < tokens):
            changed = x.clone()
            changed[:, cut:] = (_LOUD * torch.randn(1, tokens - cut, width, generator=generator)).to(where)
            change = (copied(changed) - y).abs().amax((0, 2))  # [T]
            before.append(change[:cut].max())
            after.append(change[cut:].max())
    return Leak(*(float(torch.stack(changes).max()) for changes in (before, after)))  # NaN stays NaN


def require_causal(mixer: nn.Module, width: int, name: str) -> None:
    """Accept a mixer through which the future does not reach the past.

    Raises CausalityError when it does, or when the mixer does not react at all.
    """
    leaks = leak(mixer, width)
    if leaks.before != 0 or not leaks.after > 0:
        raise CausalityError(
            f"{name}: expected that later tokens change no earlier output, got changes of {leaks.before:g} in"
            f" earlier and of {leaks.after:g} in later ones. Use a mixer marked causal."
        )
