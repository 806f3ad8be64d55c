"""The ways to hold a spectrum in memory: one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul.code_blocks import Spectrum, check
from spectral_surgery.matmul.coded import coded_form
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.host_offload import HostMatrix
from spectral_surgery.matmul.level_form import LevelForm, level_form
from spectral_surgery.matmul.planes import LAYOUTS, Layout
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


# the narrowest first; outliers stay on the device, so that at most one code in 4096 may be one of few bits
_STREAMED = (
    *(replace(LAYOUTS[name], most_beyond=1 << 12) for name in ("int4", "int5")),
    *(LAYOUTS[name] for name in ("int8", "int12")),
)


def streamed_bytes(weights: int, stored: int) -> int:
    """Bytes on the device, at most; the codes are in host memory."""
    held = {layout: sum(plane.width(weights) for plane in layout.planes) for layout in _STREAMED}
    return max(layout.most_bytes(weights, stored) - held[layout] for layout in _STREAMED)


def streamed_form(ranges: RowRanges) -> Form:
    """Levels of a matrix in host memory: 4, 5 or 8 bits each where they fit, else 12.

    Raises ConfigError when they do not fit 12 bits, or a row is larger than a buffer.
    """
    form = _narrowest(ranges, _STREAMED)
    planes = [form.codes, form.lowest.view(torch.int8)]
    rows = torch.cat(planes, 1) if form.lowest.numel() else form.codes
    none = form.codes.new_empty((0, 0)), form.codes.new_empty((form.shape[0], 0))
    return replace(form, codes=none[0], lowest=none[1], host=HostMatrix.of(rows))


def _narrowest(ranges: RowRanges, layouts: Sequence[Layout]) -> LevelForm:
    try:
        return level_form(ranges, layouts[0])
    except ConfigError:
        if len(layouts) == 1:
            raise
    return _narrowest(ranges, layouts[1:])


RESIDENTS = Table(
    "resident form",
    (
        *(
            Resident(row.name, partial(level_form, layout=row), row.most_bytes, row.help, one_offset=row.points)
            for row in LAYOUTS.values()
        ),
        Resident("coded", coded_form, lambda _, stored: stored, "the stored bytes, for all codes; decoded on the fly"),
        Resident(
            "streamed",
            streamed_form,
            streamed_bytes,
            "as int4, int5, int8 or int12 in host memory; a GPU gets them block by block",
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
