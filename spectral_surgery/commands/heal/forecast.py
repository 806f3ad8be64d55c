"""What a healing can be expected to bring, from the pace of its first steps and curves that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spectral_surgery.training.loop import Pace

# Where no text has touched the coefficients, the held-out loss after n steps is about that before them, times
# (1 + n / _SCALE) to the power of -_DECAY. Measured at --sparsity 0.2: a Llama of 5.9 M parameters, KL 1.91 to 0.56 in
# 20 steps and 0.29 in 60; one of 135 M, 13.5 to 3.4 in 28. After calibration no such law was found.
_SCALE, _DECAY = 5.0, 0.76
USABLE = 1.0  # nats a token: the perplexity is about e times that of the original
_LONGEST = 100_000  # steps; beyond, training longer is no advice


@dataclass(frozen=True)
class Forecast:
    """What to expect.

    Attributes:
        pace: of the first steps.
        untouched: whether no text has chosen or trained the coefficients before; else nothing is expected.
        tokens: whether the loss is a KL of next tokens, in nats.
        blocks: that are trained for as many steps each; 1 when all are trained together.
    """

    pace: Pace
    untouched: bool
    tokens: bool
    blocks: int = 1

    @property
    def expected(self) -> float | None:
        """Held-out loss at the end; None where it is not known: calibrated before, in blocks, without held-out text."""
        if not self.untouched or self.blocks > 1 or not math.isfinite(self.pace.before):
            return None
        left: float = (1 + self.pace.steps / _SCALE) ** -_DECAY
        return self.pace.before * left

    @property
    def hopeless(self) -> bool:
        """Whether the result is not going to write usable text."""
        return self.tokens and self.expected is not None and self.expected > USABLE

    @property
    def steps_needed(self) -> int | None:
        """Steps to usable text; None where that is unknown, or too many."""
        if not self.hopeless:
            return None
        needed = _SCALE * ((self.pace.before / USABLE) ** (1 / _DECAY) - 1)
        return math.ceil(needed) if needed < _LONGEST else None

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        needed = self.steps_needed
        return {
            "steps": self.pace.steps,
            "seconds_of_a_step": self.pace.seconds,
            "held_out_before": self.pace.before if math.isfinite(self.pace.before) else None,
            "expected_held_out": self.expected,
            "hopeless": self.hopeless,
            "steps_needed": needed,
            "minutes_needed": None if needed is None else needed * self.pace.seconds / 60,
        }

    def sentences(self) -> Iterator[str]:
        """For people."""
        pace = self.pace
        each = f" of each of {self.blocks} blocks" if self.blocks > 1 else ""
        minutes = pace.steps * self.blocks * pace.seconds / 60
        yield f"{pace.steps} steps{each} of {pace.seconds:.2g} s, about {minutes:.2g} minutes"
        if self.blocks > 1 or not math.isfinite(pace.before):
            return
        now = f"held-out loss {pace.before:.3g}{' nats a token' if self.tokens else ''} now"
        if self.expected is None:
            yield f"{now}; what steps bring after calibration differs from model to model"
            return
        yield f"{now}; on other models such steps left about {self.expected:.2g}"
        if self.hopeless:
            needed = self.steps_needed
            longer = f", or {needed} steps, {needed * pace.seconds / 60:.0f} minutes" if needed else ""
            yield (
                f"warning: above {USABLE:g} a language model hardly writes usable text, and this budget does not get"
                f" there. Use --bits 3 --calibrate, which needs no healing, a higher --sparsity, --calibrate before"
                f" healing{longer}"
            )
