"""The ways to hold a spectrum in memory: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spectral_surgery.matmul.code_blocks import Spectrum, check
from spectral_surgery.matmul.coded import coded_form
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.host_offload import streamed_bytes, streamed_form
from spectral_surgery.matmul.int4 import int4_form, outlier_bytes
from spectral_surgery.matmul.int8 import int8_form
from spectral_surgery.registry import Table


@dataclass(frozen=True)
class Resident:
    """One row of RESIDENTS.

    Attributes:
        name: how users choose it.
        build: spectrum to form; raises ConfigError when the codes do not fit.
        most_bytes: (weights, stored bytes) -> bytes on the device at most.
        help: what it costs, in one line.
    """

    name: str
    build: Callable[[Spectrum], Form]
    most_bytes: Callable[[int, int], int]
    help: str


RESIDENTS = Table(
    "resident form",
    (
        Resident("int8", int8_form, lambda weights, _: weights, "one byte a weight; the fastest"),
        Resident(
            "int4",
            int4_form,
            lambda weights, _: (weights + 1) // 2 + outlier_bytes(weights),
            "half a byte a weight, where codes but a few are -8 to 7; unpacked on the fly",
        ),
        Resident("coded", coded_form, lambda _, stored: stored, "the stored bytes, for all codes; decoded on the fly"),
        Resident(
            "streamed", streamed_form, streamed_bytes, "as int4 or int8 in host memory; a GPU gets them block by block"
        ),
    ),
)


def resident_form(spectrum: Spectrum, resident: str) -> Form:
    """Hold a spectrum in memory.

    Args:
        resident: name in RESIDENTS.

    Raises:
        ConfigError: when the name is unknown, or the codes do not fit.
        ShapeError: when it is not the spectrum of a non-empty matrix.
    """
    row = RESIDENTS[resident]
    check(spectrum)
    return row.build(spectrum)
