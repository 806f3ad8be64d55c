"""How frequent the symbols of a frame are, in 4096ths, and as bytes.

Coefficients are as often positive as negative, so a table is symmetric: about zero, or about -1/2 where a symbol k
stands for numbers around k + 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.errors import CheckpointError

SLOTS = 4096
LARGEST = 127  # magnitude of a symbol

Counts = npt.NDArray[Any]  # [256] int64, by symbol + 128


@dataclass(frozen=True)
class SymbolTable:
    """Frequencies of symbols.

    Attributes:
        about_zero: whether entry k is for k and -k; else for k and -1 - k.
        entries: frequency of each of the two, in 4096ths; below 4096, and together 4096 at most.
    """

    about_zero: bool
    entries: tuple[int, ...]

    def by_symbol(self) -> Counts:
        """[256] int64 frequencies, by symbol + 128."""
        entries = np.array(self.entries, np.int64)
        out, size = np.zeros(256, np.int64), len(entries)
        out[128 : 128 + size] = entries
        if self.about_zero:
            out[129 - size : 129] = entries[::-1]
        else:
            out[128 - size : 128] = entries[::-1]
        return out

    def bits(self, counts: Counts) -> float:
        """What symbols that occur so often take, and the table."""
        used = counts > 0
        return float(-(counts[used] * np.log2(self.by_symbol()[used] / SLOTS)).sum()) + 8 * len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The number of entries, and each: in one byte below 128, else in two, of which the first has the high bit."""
        out = bytearray([len(self.entries)])
        for entry in self.entries:
            out += bytes([entry]) if entry < 128 else bytes([128 | entry >> 8, entry & 255])
        return bytes(out)

    @classmethod
    def from_bytes(cls, data: memoryview, about_zero: bool) -> tuple[SymbolTable, int]:
        """The table at the start of some bytes, and how many it takes. Raises CheckpointError when it is damaged."""
        entries, at = [], 1
        for _ in range(data[0] if data else 0):
            wide = at < len(data) and data[at] >= 128
            if at + wide >= len(data):
                raise CheckpointError("spectral frame: a table ends early; the data is damaged. Fetch the file again.")
            entries.append((data[at] & 127) << 8 | data[at + 1] if wide else data[at])
            at += 1 + wide
        total = 2 * sum(entries) - (entries[0] if about_zero and entries else 0)
        if not entries or len(entries) > LARGEST + 1 or max(entries) >= SLOTS or total > SLOTS:
            raise CheckpointError(
                f"spectral frame: a table of {len(entries)} entries adds up to {total}; expected {SLOTS} at most. The"
                " data is damaged: fetch the file again."
            )
        return cls(about_zero, tuple(entries)), at


def fitted_table(counts: Counts, about_zero: bool) -> SymbolTable:
    """The table for symbols that occur so often; every one that occurs has a frequency."""
    positive, negative = counts[128:], counts[128:0:-1] if about_zero else counts[127::-1]
    weights = (positive + negative).astype(np.float64) / 2
    if about_zero:
        weights[0] = counts[128]
    times = np.full(128, 2, np.int64)
    times[0] -= about_zero
    size = int(np.flatnonzero(weights)[-1]) + 1 if weights.any() else 1
    weights, times = weights[:size], times[:size]
    entries = np.floor(weights * (SLOTS / max(float((weights * times).sum()), 1.0)) + 0.5).astype(np.int64)
    entries = np.clip(entries, weights > 0, SLOTS - 1)
    while (over := int((entries * times).sum()) - SLOTS) > 0:
        largest = int(np.where(entries > 1, entries * times, 0).argmax())
        entries[largest] -= max(1, min(over // int(times[largest]), int(entries[largest]) // 2))
    largest = int((entries * times).argmax())
    entries[largest] = min(entries[largest] + -over // times[largest], SLOTS - 1)
    if not entries.any():
        entries[0] = 1
    return SymbolTable(about_zero, tuple(int(entry) for entry in entries))


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
