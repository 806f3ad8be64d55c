"""How frequent the symbols of a frame are, in 4096ths, and as bytes.

Coefficients are mostly as often positive as negative, so a table is symmetric: about zero, or about -1/2 where a symbol
k stands for numbers around k + 1/2. Where this takes fewer bits, a table has an entry for every symbol instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.errors import CheckpointError

SLOTS = 4096
ABOUT_ZERO, ABOUT_HALF, NONE = range(3)  # symmetries

Counts = npt.NDArray[Any]  # [256] int64, by symbol + 128


@dataclass(frozen=True)
class SymbolTable:
    """Frequencies of symbols.

    Attributes:
        symmetry: what entry k is for: k and -k (ABOUT_ZERO), k and -1 - k (ABOUT_HALF), or ``first`` + k (NONE).
        entries: frequency of each symbol, in 4096ths; below 4096, and of all symbols together 4096 at most.
        first: symbol of the first entry, where there is no symmetry.
    """

    symmetry: int
    entries: tuple[int, ...]
    first: int = 0

    def by_symbol(self) -> Counts:
        """[256] int64 frequencies, by symbol + 128."""
        entries = np.array(self.entries, np.int64)
        out, size = np.zeros(256, np.int64), len(entries)
        first = self.first if self.symmetry == NONE else 0
        out[128 + first : 128 + first + size] = entries
        if self.symmetry == ABOUT_ZERO:
            out[129 - size : 129] = entries[::-1]
        elif self.symmetry == ABOUT_HALF:
            out[128 - size : 128] = entries[::-1]
        return out

    def to_bytes(self) -> bytes:
        """The number of entries, and each: in one byte below 128, else in two, of which the first has the high bit.

        Without symmetry, before them: a zero, and the first symbol + 128.
        """
        out = bytearray([0, self.first + 128] if self.symmetry == NONE else [])
        out.append(len(self.entries))
        for entry in self.entries:
            out += bytes([entry]) if entry < 128 else bytes([128 | entry >> 8, entry & 255])
        return bytes(out)

    @classmethod
    def from_bytes(cls, data: memoryview, symmetry: int) -> tuple[SymbolTable, int]:
        """The table at the start of some bytes, and how many it takes. Raises CheckpointError when it is damaged."""
        at, first = 0, 0
        if len(data) > 2 and data[0] == 0:
            symmetry, first, at = NONE, data[1] - 128, 2
        size, entries = data[at] if at < len(data) else 0, list[int]()
        at += 1
        for _ in range(size):
            wide = at < len(data) and data[at] >= 128
            if at + wide >= len(data):
                raise CheckpointError("spectral frame: a table ends early; the data is damaged. Fetch the file again.")
            entries.append((data[at] & 127) << 8 | data[at + 1] if wide else data[at])
            at += 1 + wide
        fits = 0 < size <= (128 - first if symmetry == NONE else 128) and max(entries) < SLOTS
        table = cls(symmetry, tuple(entries), first)
        if not fits or int(table.by_symbol().sum()) > SLOTS:
            raise CheckpointError(
                f"spectral frame: a table of {size} entries does not add up to {SLOTS}; the data is damaged. Fetch the"
                " file again."
            )
        return table, at


def fitted_table(counts: Counts, symmetry: int) -> SymbolTable:
    """The table for symbols that occur so often, with or without symmetry, whichever takes fewer bits.

    Every symbol that occurs has a frequency.
    """
    from spectral_surgery.kernels.frame_plans import fit

    entries = np.zeros(256, np.int64)
    found, first, size, _ = fit(counts, symmetry, entries)
    return SymbolTable(found, tuple(entries[:size].tolist()), first)


def with_parity(frequencies: Counts) -> Counts:
    """Frequencies of symbols of which one bit is known: [2, 256], of even and of odd ones.

    Those of the parity are scaled to 4096 slots and rounded down, which leaves at least one to each, and the most
    frequent of them, the first of several, takes what is left over, up to 4095.
    """
    out = np.zeros((2, 256), np.int64)
    for parity in (0, 1):
        chosen = frequencies[parity::2]
        total = int(chosen.sum())
        if total:
            scaled = chosen * SLOTS // total
            largest = int(scaled.argmax())
            scaled[largest] = min(scaled[largest] + SLOTS - int(scaled.sum()), SLOTS - 1)
            out[parity, parity::2] = scaled
    return out
