"""What the kernels of products on a GPU are told: how matrices are read, and how products are cut into programs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.transforms import IDENTITY

Chip = Literal["8.0", "8.6", "9.0", "10.0", "amd", "rdna"]  # kinds of chips that cuts differ for

DIGITS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that hold one of the type
FEW = 16  # tokens: with more, activations are transformed once, and not by every program again
_SIDE = 64  # terms that are transformed at a time; tiles of 128 have twice as many
_AMD = ("amd", "rdna")
_PROGRAMS = 256  # about two for each multiprocessor of a large GPU: loads of some hide the arithmetic of others


class Planes(NamedTuple):
    """How levels are held: which planes of `planes.LAYOUTS` there are, and the grid of their numbers."""

    BYTES: bool
    NIBBLES: bool
    BITS: bool
    PARTS: int = 1
    SHIFT: int = 0


class Matrix(NamedTuple):
    """What of a form kernels are compiled for, and its shape.

    Attributes:
        rows: O.
        terms: I.
        planes: of its levels.
        basis: transform, tile and axes.
        per_column: whether columns have scales.
        per_row: whether rows have.
        outliers: whether there are any.
    """

    rows: int
    terms: int
    planes: Planes
    basis: Basis
    per_column: bool = False
    per_row: bool = False
    outliers: bool = False

    @property
    def width(self) -> int:
        """Columns that are read one after the other: those of a half, where bytes have a nibble of each."""
        return -(-self.terms // 2) if self.planes.NIBBLES else self.terms

    @property
    def side(self) -> int:
        """Terms that are transformed at a time."""
        return max(_SIDE, tile_of(self.basis))

    @property
    def turn(self) -> int:
        """Columns one after the other that a turn of the loop of few tokens reads: of a half, or of two tiles."""
        return self.side if self.planes.NIBBLES else 2 * self.side

    @property
    def ragged(self) -> bool:
        """Whether tiles at the end are smaller, or halves begin within one."""
        return self.terms % self.side > 0 or self.width % self.side > 0


class Cut(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        tokens: of a program, T.
        rows: of a block, R.
        blocks: of rows, of a program.
        terms: at a time, K.
        splits: programs that share the terms of the same rows.
        warps: of a program.
        stages: turns of a loop that are loaded ahead, and take shared memory.
    """

    tokens: int
    rows: int
    blocks: int
    terms: int
    splits: int
    warps: int
    stages: int


def chip_of(capability: tuple[int, int]) -> Chip:
    """The kind of a chip of NVIDIA, by what its multiprocessors have."""
    if capability[0] in (10, 11):
        return "10.0"
    return "9.0" if capability[0] == 9 else "8.0" if capability == (8, 0) else "8.6"


class Rule(NamedTuple):
    """A row of `FEW_TOKENS`, for what it names; the first that fits holds.

    Attributes:
        rows: of a block.
        blocks: of rows, of a program.
        warps: of a program.
        stages: turns that are loaded ahead.
        source: where the numbers come from: what `benchmarks gpu_static` counts of these and of larger ones. Ratios
            are the time of instructions over that of reading codes, for 4096 x 4096.
        chips: kinds of chips; all if empty.
        ragged: whether it is for ragged matrices; None for both.
        exact: whether it is for activations of more digits than bfloat16 has; None for both.
        layouts: with nibbles and bytes or bits (True), with one plane (False), or both (None).
        tokens: from the first to the last.
    """

    rows: int
    blocks: int
    warps: int
    stages: int
    source: str
    chips: tuple[Chip, ...] = ()
    ragged: bool | None = None
    exact: bool | None = None
    two_planes: bool | None = None
    nibbles: bool | None = None
    tokens: tuple[int, int] = (1, 16)


FEW_TOKENS = (
    Rule(64, 1, 8, 1, "what spilled no register when 64 and 128 rows were tried", chips=("amd",)),
    Rule(64, 1, 16, 1, "8 warps spill 37 registers of int4 and 60 of int5", chips=("rdna",)),
    Rule(64, 1, 8, 1, "8.0, 8.6: 4 warps spill for int12, int5", chips=("8.0", "8.6"), ragged=True, exact=True),
    Rule(64, 1, 4, 1, "9.0: 146 registers at most; 128 rows spill", ragged=True),
    Rule(128, 1, 4, 2, "9.0: 198 registers with 2 blocks of one plane; of two planes they spill", exact=True),
    Rule(128, 1, 4, 2, "9.0: 255 registers with 2 blocks and 16 tokens", two_planes=True),
    Rule(128, 1, 4, 2, "100 KB of shared memory: 2 blocks of int8 take 76", chips=("8.6",)),
    Rule(128, 4, 4, 2, "9.0: ratio .45; with 2 blocks .50", chips=("9.0",), nibbles=True, tokens=(5, 8)),
    Rule(128, 2, 4, 2, "9.0: ratio .73 for int4", tokens=(9, 16)),
    Rule(128, 2, 4, 3, "9.0: ratio .42 for int4; with 1 block .70, with 4 .33 but half as many programs"),
)


def few_at_most(matrix: Matrix, dtype: torch.dtype, chip: Chip) -> int:
    """Tokens that `few_tokens` takes; what has no registers for it goes through `product`."""
    exact, planes = dtype != torch.bfloat16, matrix.planes
    if chip in _AMD and (matrix.ragged or exact):
        return 0
    crowded = exact and matrix.ragged and (chip in ("8.0", "8.6") or planes.BITS)
    return FEW // 2 if crowded or (chip == "rdna" and _two(planes)) else FEW


def few_cut(matrix: Matrix, tokens: int, dtype: torch.dtype, chip: Chip, matrices: int = 1) -> Cut:
    """How up to 16 tokens are cut into programs, by `FEW_TOKENS`.

    Args:
        matrices: that are multiplied at the same time.
    """
    rule = next(rule for rule in FEW_TOKENS if _holds(rule, matrix, tokens, dtype, chip))
    rows = max(rule.rows, matrix.side)
    groups = -(-matrix.rows // (rows * rule.blocks))
    splits = max(1, min(_PROGRAMS // (groups * matrices), -(-matrix.width // matrix.turn)))
    wide = 8 if dtype != torch.float32 else FEW  # for a unit that takes 16 digits at least
    least = {"10.0": wide, "amd": 8, "rdna": 8}.get(chip, 4)
    lanes = max(least, 4 if tokens <= 4 else 8 if tokens <= 8 else FEW)
    return Cut(lanes, rows, rule.blocks, matrix.side, splits, rule.warps, rule.stages)


def _two(planes: Planes) -> bool:
    return planes.BITS or (planes.BYTES and planes.NIBBLES)


def _holds(rule: Rule, matrix: Matrix, tokens: int, dtype: torch.dtype, chip: Chip) -> bool:
    planes = matrix.planes
    asked = {
        "ragged": matrix.ragged or matrix.side > _SIDE,
        "exact": dtype != torch.bfloat16,
        "two_planes": _two(planes),
        "nibbles": planes.NIBBLES,
    }
    fits = not rule.chips or chip in rule.chips
    fits = fits and rule.tokens[0] <= tokens <= rule.tokens[1]
    return fits and all(getattr(rule, name) in (None, has) for name, has in asked.items())


def many_cut(matrix: Matrix, tokens: int, dtype: torch.dtype, chip: Chip) -> Cut:
    """How more tokens are; with more digits to hold, fewer tokens and terms leave the registers that these need."""
    terms = _SIDE if dtype == torch.bfloat16 else _SIDE // 2
    if chip == "rdna" and matrix.planes.BYTES and matrix.planes.NIBBLES:  # which spills with 128 rows
        return Cut(FEW, 64, 1, _SIDE // 4, 1, 8, 2)
    if tokens <= FEW:
        return Cut(FEW, 128, 1, terms, 1, 8 if chip in _AMD else 4, 2)
    if chip in _AMD:
        return Cut(32, 128, 1, terms // 2, 1, 8, 2)
    if terms < _SIDE and matrix.planes.BITS:  # 8.0 spills with 64 tokens
        return Cut(32, 128, 1, terms, 1, 8, 2)
    many = tokens > 64 and terms == _SIDE and (chip == "9.0" or (chip != "10.0" and not _two(matrix.planes)))
    return Cut(128 if many else 64, 128, 1, terms, 1, 8, 2)  # 8.6 spills 189 registers of int12 with 128


def few_constants(matrix: Matrix, c: Cut, dtype: torch.dtype, bias: bool, backend: str) -> dict[str, Any]:
    """What `few_tokens` is compiled for: its arguments in capital letters."""
    turned = turned_axes(matrix.basis)
    offset = matrix.width % c.terms if matrix.planes.NIBBLES else 0
    inputs = {"FORWARD": 1 in turned, "OFFSET": offset, "RAGGED": matrix.ragged, "SPLITS": c.splits}
    outputs = {"INVERSE": 0 in turned, "BIAS": bias, "SIDE": c.terms, "BLOCKS": c.blocks}
    digits = {"DIGITS": 3 if dtype == torch.float32 else 2}
    return {**many_constants(matrix, c, dtype, backend), **inputs, **outputs, **digits}


def many_constants(matrix: Matrix, c: Cut, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """The same of `product`."""
    cuts = {"T": c.tokens, "R": c.rows, "K": c.terms, "DIGITS": DIGITS[dtype], "BACKEND": backend}
    more = {"PER_COLUMN": matrix.per_column, "PER_ROW": matrix.per_row, "OUTLIERS": matrix.outliers}
    return {**cuts, **matrix.planes._asdict(), **more}


def mixing(dtype: torch.dtype) -> torch.dtype:
    """Of the small matrices that transform activations of a type; float32 ones are split in the kernel."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def fits(basis: Basis) -> bool:
    """Whether blocks of rows and of terms are whole tiles."""
    return tile_of(basis) <= 128 and not max(_SIDE, tile_of(basis)) % tile_of(basis)


def turned_axes(basis: Basis) -> tuple[int, ...]:
    """The axes of a matrix that are transformed."""
    return basis.axes if basis.transform != IDENTITY.name else ()


def tile_of(basis: Basis) -> int:
    """Its tile; 1 where nothing is transformed."""
    return basis.tile if turned_axes(basis) else 1
