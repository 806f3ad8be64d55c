"""Files cut large matrices into row ranges, each with steps and an offset; one form holds them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.code_blocks import Spectrum, basis_of, code_blocks

Read = Callable[[int], Spectrum]


@dataclass(frozen=True)
class RowRanges:
    """Spectra of consecutive row ranges of a matrix that one form can hold; they are read one at a time.

    Attributes:
        outlines: the spectra; stored ones may be without their frames.
        read: number of a spectrum to the spectrum itself.
    """

    outlines: tuple[Spectrum, ...]
    read: Read

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return sum(outline.shape[0] for outline in self.outlines), self.outlines[0].shape[1]

    @property
    def basis(self) -> Basis:
        """Transform, tile and axes, of all."""
        return basis_of(self.outlines[0])

    @property
    def device(self) -> torch.device:
        """Where the steps are."""
        return self.outlines[0].step.device

    def blocks(self, out: Tensor | None = None) -> Iterator[tuple[Spectrum, int, Tensor]]:
        """Spectrum, first row in the matrix, and codes [r, I] of blocks of rows.

        ``out`` is [O, I] int8 on the CPU, where stored int8 codes are decoded to.
        """
        first = 0
        for number, outline in enumerate(self.outlines):
            rows, spectrum = slice(first, first + outline.shape[0]), self.read(number)
            for start, codes in code_blocks(spectrum, None if out is None else out[rows]):
                yield spectrum, first + start, codes
            first = rows.stop

    def scales(self, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What a level times stands for its coefficient, as `Form` has it: scale and row_scale.

        Args:
            parts: of a step that levels count, for each spectrum.
        """
        steps = [outline.step.to(torch.float32) for outline in self.outlines]
        if len(set(parts)) == 1 and all(torch.equal(step, steps[0]) for step in steps[1:]):
            return steps[0] / parts[0], steps[0].new_empty(0)
        unit = steps[0]
        if unit.numel() == 1:  # a power of two: what rows have is then not rounded
            unit = torch.ldexp(torch.ones_like(unit), torch.frexp(unit).exponent)
        factors = [step[:1] / unit[:1] / part for step, part in zip(steps, parts, strict=True)]
        rows = [outline.shape[0] for outline in self.outlines]
        return unit, torch.cat([factor.expand(count) for factor, count in zip(factors, rows, strict=True)])


def row_ranges(outlines: Sequence[Spectrum], read: Read | None = None, *, one_offset: bool) -> list[RowRanges]:
    """As few as possible, in order of rows.

    Args:
        outlines: of consecutive row ranges of a matrix; stored ones may be without their frames.
        read: number to spectrum; None where they have all.
        one_offset: whether spectra of different offsets are apart.
    """
    ends = [0]
    for number, (one, other) in enumerate(pairwise(outlines), 1):
        apart = one_offset and one.offset != other.offset
        if apart or not _continues(one, other):
            ends.append(number)
    of = read or outlines.__getitem__
    return [
        RowRanges(tuple(outlines[start:stop]), lambda number, start=start: of(start + number))  # type: ignore[misc]
        for start, stop in pairwise([*ends, len(outlines)])
        if stop > start
    ]


def _continues(one: Spectrum, other: Spectrum) -> bool:
    basis = basis_of(one)
    aligned = 0 not in basis.axes or not one.shape[0] % basis.tile
    alike = basis == basis_of(other) and one.shape[1] == other.shape[1]
    steps = one.step.numel() == other.step.numel() == 1 or torch.equal(one.step, other.step)
    return aligned and alike and steps
