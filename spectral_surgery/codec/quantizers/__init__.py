"""Ways to turn coefficients into integers: one file and one row each."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from spectral_surgery.codec.quantized import Moments
from spectral_surgery.codec.quantizers.lattice import Lattice
from spectral_surgery.codec.quantizers.scalar import Scalar
from spectral_surgery.codec.sample import Sample
from spectral_surgery.registry import Table


class Rounding(Protocol):
    """A quantiser whose step is chosen."""

    @property
    def step(self) -> float:
        """In units of the coefficients."""
        ...

    def finer(self, ratio: float) -> Rounding:
        """The same with ``ratio`` times the step."""
        ...

    def learned(self, codes: Tensor) -> Rounding:
        """The same, with prices of codes as often as they occur in [O, I] integers; for `feedback`."""
        ...

    def quantize(self, coefficients: Tensor) -> tuple[Tensor, Moments]:
        """[r, I] float32, whole blocks of 32 rows but for the last, to integer codes and what they add up to."""
        ...

    def feed(self, block: Tensor, square: Tensor, steps: Tensor, offset: float) -> tuple[Tensor, Tensor]:
        """Codes of columns that take up what the rounding of those before them left; see `codec.feedback`.

        Returns [r, n] int32 codes, and [r, n] float32, what columns after these have to take up.

        Args:
            block: [r, n] float32, C-contiguous; changed.
            square: [n, n] float32, C-contiguous: of the factor, for these columns.
            steps: [n] float32.
            offset: of the points codes stand for, in steps.
        """
        ...

    def reconstruction(self, moments: Moments, largest: int) -> tuple[float, float]:
        """Step and offset of the points that codes up to ``largest`` stand for; see `QuantizedSpectrum`."""
        ...


class Quantizer(Protocol):
    """A way to choose a `Rounding` for a sample of coefficients that are not all zero."""

    @property
    def name(self) -> str:
        """As users choose it."""
        ...

    def for_bits(self, sample: Sample, bits: float) -> Rounding:
        """The one of the least error for so many bits a coefficient."""
        ...

    def for_error(self, sample: Sample, relative_error: float) -> Rounding:
        """The one of the fewest bits for an error."""
        ...


QUANTIZERS: Table[Quantizer] = Table("quantizer", (Scalar(), Lattice()))
DEFAULT = {"bits": "lattice", "max_error": "lattice", "density": "scalar"}  # by kind of target
