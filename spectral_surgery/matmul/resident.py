"""The ways to hold a spectrum in memory: one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectral_surgery.matmul.code_blocks import Spectrum, check
from spectral_surgery.matmul.coded import coded_form
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.host_offload import streamed_bytes, streamed_form
from spectral_surgery.matmul.int4 import int4_form, outlier_bytes
from spectral_surgery.matmul.int5 import int5_bytes, int5_form
from spectral_surgery.matmul.int8 import int8_bytes, int8_form
from spectral_surgery.matmul.int12 import int12_bytes, int12_form
from spectral_surgery.matmul.row_ranges import Read, RowRanges, row_ranges
from spectral_surgery.registry import Table


@dataclass(frozen=True)
class Resident:
    """One row of RESIDENTS.

    Attributes:
        name: how users choose it.
        build: spectra of row ranges to a form; raises ConfigError when the codes do not fit.
        most_bytes: (weights, stored bytes) -> bytes on the device at most.
        help: what it costs, in one line.
        one_offset: whether ranges of different offsets need forms of their own.
    """

    name: str
    build: Callable[[RowRanges], Form]
    most_bytes: Callable[[int, int], int]
    help: str
    one_offset: bool = True


RESIDENTS = Table(
    "resident form",
    (
        Resident("int8", int8_form, int8_bytes, "one byte a weight; the fastest", one_offset=False),
        Resident(
            "int12", int12_form, int12_bytes, "a byte and a half a weight, for codes up to 2039", one_offset=False
        ),
        Resident(
            "int4",
            int4_form,
            lambda weights, _: (weights + 1) // 2 + outlier_bytes(weights),
            "half a byte a weight, where codes but a few are -8 to 7",
        ),
        Resident("int5", int5_form, int5_bytes, "five bits a weight, where codes but a few are -16 to 15"),
        Resident("coded", coded_form, lambda _, stored: stored, "the stored bytes, for all codes; decoded on the fly"),
        Resident(
            "streamed", streamed_form, streamed_bytes, "as int4 or int8 in host memory; a GPU gets them block by block"
        ),
    ),
)


def resident_form(spectrum: Spectrum, resident: str) -> Form:
    """Hold a spectrum in memory; see `resident_forms`."""
    return resident_forms([spectrum], resident)[0]


def resident_forms(spectra: Sequence[Spectrum], resident: str, read: Read | None = None) -> list[Form]:
    """Hold a matrix in memory.

    Returns one form; more where row ranges have different transforms or steps of columns, begin within a tile, or have
    different offsets, which only int8 takes.

    Args:
        spectra: of consecutive row ranges; stored ones may be without their frames.
        resident: name in RESIDENTS.
        read: the number of a spectrum to all of it, called when it is needed; None where nothing is missing.

    Raises:
        ConfigError: when the name is unknown, or the codes do not fit.
        ShapeError: when one is not the spectrum of a non-empty matrix.
    """
    row = RESIDENTS[resident]
    for spectrum in spectra:
        check(spectrum)
    ranges = row_ranges(spectra, read, one_offset=row.one_offset)
    return [row.build(some) for some in ranges]
