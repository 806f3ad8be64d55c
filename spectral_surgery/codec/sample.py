"""Some coefficients of a spectrum, from all over it, on which a quantiser is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from spectral_surgery.codec.rate import Magnitudes
from spectral_surgery.kernels import BLOCK

Floats = npt.NDArray[np.float32]

_MEDIAN = 0.6745  # of magnitudes of Gaussian numbers, in units of their root mean square
_SOME = 4  # one block of so many
_SIZE, _SIZE_OF_BLOCKS = 1 << 17, 1 << 16  # coefficients


class Sample:
    """About 2^17 coefficients, or 2^16 in blocks.

    Args:
        frames: [r, I] float32 each, on the CPU.

    Attributes:
        found: what a quantiser found on some of it, by where it looked, for the next time.
    """

    def __init__(self, frames: Sequence[Tensor]) -> None:
        self.found: dict[float, Any] = {}
        self._frames = frames
        self._total = sum(frame.numel() for frame in frames)

    @cached_property
    def magnitudes(self) -> Magnitudes:
        """Every so many coefficients of the spectrum."""
        flat = [frame.reshape(-1) for frame in self._frames]
        stride = max(1, self._total // _SIZE) | 1  # odd: does not resonate with tiles
        return Magnitudes(np.concatenate([frame[::stride].numpy() for frame in flat]))

    @cached_property
    def blocks(self) -> Floats:
        """[32, n]: every so many blocks of 32 rows of a column; of all the rows where there are fewer."""
        height = min(BLOCK, max(len(frame) for frame in self._frames))
        rows = [
            frame[start : start + height].numpy()
            for frame in self._frames
            for start in range(0, len(frame) - height + 1, height)
        ]
        stride = max(1, sum(part.size for part in rows) // _SIZE_OF_BLOCKS) | 1
        joined = (part[:, number % stride :: stride] for number, part in enumerate(rows))  # not the same columns
        return np.ascontiguousarray(np.concatenate(list(joined), 1))

    @cached_property
    def some(self) -> Floats:
        """[32, n]: one of so many of the blocks."""
        return np.ascontiguousarray(self.blocks[:, ::_SOME])

    @cached_property
    def spread(self) -> tuple[float, float]:
        """Root mean square of the blocks; and as their median has it, which a few large ones do not move."""
        rms = math.sqrt(float(np.square(self.blocks, dtype=np.float64).mean()))
        return rms, float(np.median(np.abs(self.blocks[self.blocks != 0]))) / _MEDIAN
