"""How many steps fit into a time, learnt from what steps, judging and saving took before."""

from __future__ import annotations

from collections import deque

_RECENT = 4  # steps that say how long the next ones take
_JUDGED = 0.1  # of what is left before the first step is for judging, at most
_STEP = 2.0  # times what one batch takes to be judged, weights included, is what a step takes: gradients, and Adam


class TimeLimit:
    """What a training takes, and what it may take.

    The machine may get slower on the way: what was measured before counts as many times as steps are slower now.

    Attributes:
        seconds: that it may take; infinite where steps are counted instead.
        judging: seconds of the last evaluation.
        batch: seconds that one batch took to be judged, with weights that were not computed before.
        saving: seconds of keeping unfinished work, the last time.
        recent: seconds of the last steps.
    """

    def __init__(self, seconds: float, after: float, eval_every: int) -> None:
        """Before anything was measured.

        Args:
            after: seconds of what comes after the training, as fast as the machine is before it.
            eval_every: steps between evaluations.
        """
        self.seconds, self._after, self._every = seconds, after, eval_every
        self.judging, self.batch, self.saving, self.recent = 0.0, 0.0, 0.0, deque[float](maxlen=_RECENT)
        self._first, self._then = 0.0, 0.0  # seconds of the first step, and of those before the last evaluation

    def stepped(self, seconds: float) -> None:
        """Learn from a step."""
        self.recent.append(seconds)
        self._first = self._first or seconds
        self._then = self._then or seconds

    def judged(self, seconds: float) -> None:
        """Learn from an evaluation."""
        self.judging = seconds
        self._then = self._mean if self.recent else 0.0

    def for_judging(self, now: float) -> float:
        """Seconds for the evaluation before the first step.

        Args:
            now: seconds that are gone.
        """
        return _JUDGED * (self.seconds - now - self._after)

    @property
    def least(self) -> float:
        """Seconds from the first step on, with what comes after the training: of one step, and judging."""
        return _STEP * self.batch + self.judging + self._after

    @property
    def each(self) -> float:
        """Seconds of a step, with its share of the evaluations."""
        return self._mean + (self.judging + self.saving) / self._every

    @property
    def after(self) -> float:
        """Seconds of what comes after the training, on the machine as it is now; as it was, before the first step."""
        return self._after * self._slower(self._first) * self._uneven

    def steps(self, now: float) -> int:
        """Steps that fit, the last evaluation and what comes after it included; one of them as slow as the slowest.

        Args:
            now: seconds that are gone.
        """
        end = self.judging * self._slower(self._then) * self._uneven + self.after
        left = self.seconds - now - end - (max(self.recent) - self._mean)
        return max(0, int(left / self.each))

    @property
    def _mean(self) -> float:
        return sum(self.recent) / len(self.recent)

    @property
    def _uneven(self) -> float:
        """The slowest step over the usual: a margin."""
        return max(self.recent) / self._mean if self.recent and self._mean > 0 else 1.0

    def _slower(self, before: float) -> float:
        return max(1.0, self._mean / before) if before > 0 else 1.0
