"""Products of levels on a GPU, each in one launch of a kernel of `spectral_surgery.gpu`, and what these are told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.activations import to_space, to_spectrum
from spectral_surgery.matmul.dispatch import transform_dtype, way
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.matrix_job import Kind
from spectral_surgery.matmul.unreadable import unreadable
from spectral_surgery.transforms import IDENTITY, TRANSFORMS
from spectral_surgery.transforms.base import constants

DIGITS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that hold one of the type
FEW = 16  # tokens: with more, activations are transformed once, and not by every program again
_SIDE = 64  # terms at a time; tiles of 128 have twice as many
_FEW_ROWS = 128  # of a program: digits are made for more levels than with 64, and registers suffice
_PROGRAMS = 512  # about four for each multiprocessor of a large GPU: loads of some hide the arithmetic of others
_LEAST_STEPS = 4  # of a program along the terms
_KEPT = "_gpu_matrix"
_PLAIN = Kind("BYTES", 1, 0)

Unit = Literal["usual", "wide", "amd"]  # of matrices: that of compute capability 10.x takes no fewer than 16 lanes


class Cut(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        tokens: of a program, T.
        rows: of a program, R.
        terms: at a time, K.
        splits: programs that share the terms of the same rows.
        warps: of a program.
        stages: turns of a loop that are loaded ahead, and take shared memory.
    """

    tokens: int
    rows: int
    terms: int
    splits: int
    warps: int
    stages: int = 2


class _Kept:
    """What a product wants to know of a form, asked once, since a look at numbers on a GPU waits for it.

    Attributes:
        key: addresses of its tensors.
        kind: of its levels; None where the kernel cannot read them.
        starts: by rows of a program, the first outlier of each block of rows: [blocks + 1] int32 or int64.
    """

    def __init__(self, key: tuple[int, ...], kind: Kind | None) -> None:
        self.key, self.kind = key, kind
        self.starts: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # copies and pickles of the form go without it
        return type(None), ()


def fits(basis: Basis) -> bool:
    """Whether blocks of rows and of terms are whole tiles."""
    return _tile(basis) <= 128 and not max(_SIDE, _tile(basis)) % _tile(basis)


def product(x: Tensor, forms: Sequence[Form], bias: Tensor | None) -> Tensor | None:
    """Y = X Wᵀ + b, as exact as `form_matmul` says, in one launch a form.

    Returns [T, O] in the dtype of x; None where kernels do not run, do not take such forms, or a gradient is wanted.

    Args:
        x: [T, I] floating.
        forms: on the device of x; their rows follow each other.
        bias: [O] or None.
    """
    gradient = x.requires_grad and torch.is_grad_enabled()
    if x.dtype not in DIGITS or way(x.device.type, x.shape[1], x.dtype) != "triton" or gradient or unreadable(x):
        return None
    parts: list[Tensor] = []
    row = 0
    for form in forms:
        codes = getattr(form, "codes", None)
        kept = _kept(form) if codes is not None and codes.device == x.device and fits(form.basis) else None
        if kept is None or kept.kind is None:
            return None
        stop = row + form.shape[0]
        rest = None if bias is None else bias[row:stop]
        few = 0 < len(x) <= few_at_most(form, x.dtype, _unit(x.device))
        parts.append((_few_tokens if few else _many_tokens)(x, form, kept, rest))
        row = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def level_product(x: Tensor, codes: Tensor) -> Tensor:
    """X Mᵀ: [T, K] and [r, K] int8, with any strides, to [T, r] float32; nothing is transformed."""
    one = _one(x.device)
    form = _Plain(codes, one, one[:0], one[:0], one[:0], (len(codes), x.shape[1]))
    y = x.new_empty((len(x), len(codes)), dtype=torch.float32)
    return _levels_times(x, form, _Kept((), _PLAIN), y)


class _Plain(NamedTuple):
    """Levels of which nothing but a product is wanted; see `Levels`."""

    codes: Tensor
    scale: Tensor
    row_scale: Tensor
    places: Tensor
    beyond: Tensor
    shape: tuple[int, int]
    basis: Basis = Basis(IDENTITY.name, 1, ())


def _few_tokens(x: Tensor, form: Any, kept: _Kept, bias: Tensor | None) -> Tensor:
    from spectral_surgery.gpu.few_tokens import few_tokens

    y = x.new_empty((len(x), form.shape[0]))
    x = _rows_together(x)
    (rows, terms), width, c = form.shape, form.codes.shape[1], few_cut(form, len(x), x.dtype, _unit(x.device))
    blocks, unused = -(-rows // c.rows), form.scale
    sums = unused.new_empty(blocks * c.splits * c.rows * c.tokens)
    counters = _counters(x.device) if c.splits > 1 else unused
    fixed = few_constants(form, kept.kind or _PLAIN, c, x.dtype, bias is not None)
    mixing = _mixing(x.dtype)
    into = matrices(form.basis, terms, 1, c.terms, fixed["OFFSET"], mixing, x.device) if fixed["FORWARD"] else unused
    back = matrices(form.basis, rows, 0, c.terms, 0, mixing, x.device) if fixed["INVERSE"] else unused
    tensors = (x, form.codes, into, back, form.scale, form.row_scale, unused if bias is None else bias)
    sparse = (form.places, form.beyond, _starts(form, kept, c.rows) if fixed["OUTLIERS"] else unused)
    numbers = (len(x), rows, terms, width, x.stride(0))
    with _on(x):
        few_tokens[(blocks, c.splits)](
            *tensors, *sparse, sums, counters, y, *numbers, **fixed, num_warps=c.warps, num_stages=c.stages
        )
    return y


def _many_tokens(x: Tensor, form: Any, kept: _Kept, bias: Tensor | None) -> Tensor:
    """Transforms are a product apart: within the kernel their matrices leave too few registers to it."""
    y = x.new_empty((len(x), form.shape[0]), dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32)
    wide = x.to(transform_dtype(x.device.type, len(x), x.dtype))  # tiles of float16 may have sums beyond float16
    inside = _levels_times(to_spectrum(wide, form.basis, 1), form, kept, y)
    outside = to_space(inside, form.basis, 0)
    return (outside if bias is None else outside + bias).to(x.dtype)


def _levels_times(x: Tensor, form: Any, kept: _Kept, y: Tensor) -> Tensor:
    from spectral_surgery.gpu.product import product as kernel

    if not y.numel():
        return y
    x = _rows_together(x)
    (rows, terms), width, c = form.shape, form.codes.shape[1], many_cut(len(x), x.dtype, _unit(x.device))
    fixed = many_constants(form, kept.kind or _PLAIN, c, x.dtype)
    starts = _starts(form, kept, c.rows) if fixed["OUTLIERS"] else form.scale
    tensors = (x, form.codes, form.scale, form.row_scale, form.places, form.beyond, starts, y)
    numbers = (len(x), rows, terms, width, x.stride(0), *form.codes.stride())
    with _on(x):
        kernel[-(-rows // c.rows), -(-len(x) // c.tokens)](
            *tensors, *numbers, **fixed, num_warps=c.warps, num_stages=c.stages
        )
    return y


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=16)
def _unit(device: torch.device) -> Unit:
    """Which matrix unit a device has."""
    if torch.version.hip is not None:
        return "amd"
    wide = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    return "wide" if wide else "usual"


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def few_at_most(form: Any, dtype: torch.dtype, unit: Unit) -> int:
    """Tokens that `few_tokens` takes; what has no registers for it goes through `product`."""
    ragged = form.shape[1] % _side(form) or form.codes.shape[1] % _side(form)
    if unit == "amd" and (ragged or dtype != torch.bfloat16):
        return 0
    return FEW // 2 if form.codes.shape[1] < form.shape[1] and dtype != torch.bfloat16 else FEW


def few_cut(form: Any, tokens: int, dtype: torch.dtype, unit: Unit) -> Cut:
    """How up to 16 tokens are cut into programs; sizes are those that no chip spills registers at."""
    side, width = _side(form), form.codes.shape[1]
    two_planes = width < form.shape[1]  # which are lanes of one product
    lanes = FEW if tokens > 8 or (unit != "usual" and not two_planes) else 8
    ragged, digits = form.shape[1] % side or width % side, dtype != torch.bfloat16
    crowded = ragged or digits or (two_planes and lanes == FEW)
    high = max(side, _SIDE if crowded or form.shape[0] <= _SIDE else _FEW_ROWS)
    splits = min(_PROGRAMS // max(-(-form.shape[0] // high), 1), -(-width // side) // _LEAST_STEPS)
    if unit == "amd":
        return Cut(lanes, high, side, max(splits, 1), 8, 1)
    many = two_planes and ((lanes == FEW and unit == "wide") or (ragged and digits and unit == "usual"))
    return Cut(lanes, high, side, max(splits, 1), 8 if many else 4, 1 if ragged and digits else 3)


def many_cut(tokens: int, dtype: torch.dtype, unit: Unit) -> Cut:
    """How more tokens are; with more digits to hold, fewer tokens and terms leave the registers that these need."""
    terms = _SIDE if dtype == torch.bfloat16 else _SIDE // 2
    if tokens <= FEW:
        return Cut(FEW, 128, terms, 1, 8 if unit == "amd" else 4)
    if unit == "amd":
        return Cut(32, 128, terms // 2, 1, 8)
    return Cut(128 if tokens > 64 and terms == _SIDE and unit == "usual" else 64, 128, terms, 1, 8)


def _side(form: Any) -> int:
    """Terms that are transformed at a time."""
    return max(_SIDE, _tile(form.basis))


def few_constants(form: Any, kind: Kind, c: Cut, dtype: torch.dtype, bias: bool) -> dict[str, Any]:
    """What `few_tokens` is compiled for: its arguments in capital letters."""
    fixed = many_constants(form, kind, c, dtype)
    interpreted = fixed.pop("INTERPRETED")
    terms, width = form.shape[1], form.codes.shape[1]
    offset = width % c.terms if width < terms else 0
    ragged = offset > 0 or terms % c.terms > 0
    turns = {"FORWARD": 1 in _turned(form.basis), "OFFSET": offset, "RAGGED": ragged, "SPLITS": c.splits}
    backend = "interpreter" if interpreted else "hip" if torch.version.hip else "cuda"
    ends = {"INVERSE": 0 in _turned(form.basis), "BIAS": bias, "SIDE": c.terms, "BACKEND": backend}
    return {**fixed, **turns, **ends, "DIGITS": 3 if dtype == torch.float32 else 2}


def many_constants(form: Any, kind: Kind, c: Cut, dtype: torch.dtype) -> dict[str, Any]:
    """The same of `product`."""
    from spectral_surgery.gpu.parts import INTERPRETED

    levels = {"NIBBLES": form.codes.shape[1] < form.shape[1], "PARTS": kind.parts, "SHIFT": kind.shift}
    cuts = {"T": c.tokens, "R": c.rows, "K": c.terms, "DIGITS": DIGITS[dtype]}
    scales = {"PER_COLUMN": form.scale.numel() > 1, "PER_ROW": len(form.row_scale) > 0}
    return {**cuts, **levels, **scales, "OUTLIERS": len(form.places) > 0, "INTERPRETED": INTERPRETED}


def _mixing(dtype: torch.dtype) -> torch.dtype:
    """Of small matrices; those of several digits are split in the kernel."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _kept(form: Any) -> _Kept:
    tensors = (form.codes, form.scale, form.row_scale, form.places, form.beyond)
    key = tuple(tensor.data_ptr() for tensor in tensors)
    kept: _Kept | None = vars(form).get(_KEPT)
    if kept is None or kept.key != key:
        kind = form.kind
        kept = _Kept(key, kind if kind is not None and kind.name in ("BYTES", "NIBBLES", "POINTS") else None)
        object.__setattr__(form, _KEPT, kept)
    return kept


def _starts(form: Any, kept: _Kept, height: int) -> Tensor:
    if height not in kept.starts:
        rows, columns = form.shape
        edges = torch.arange(0, rows + height, height, dtype=torch.int64, device=form.places.device) * columns
        kept.starts[height] = torch.searchsorted(form.places.long(), edges)
    return kept.starts[height]


def _counters(device: torch.device) -> Tensor:
    """[_PROGRAMS] int32 zeros for the programs of one launch at a time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(_PROGRAMS, dtype=torch.int32, device=device)  # the graph may run beside this stream
    return _stream_counters(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@lru_cache(maxsize=64)
def _stream_counters(device: torch.device, stream: int) -> Tensor:  # noqa: ARG001, one for each stream
    with constants():
        return torch.zeros(_PROGRAMS, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _one(device: torch.device) -> Tensor:
    with constants():
        return torch.ones(1, device=device)


def _turned(basis: Basis) -> tuple[int, ...]:
    """The axes of a matrix that are transformed."""
    return basis.axes if basis.transform != IDENTITY.name else ()


def _tile(basis: Basis) -> int:
    return basis.tile if _turned(basis) else 1


@lru_cache(maxsize=256)
def matrices(  # noqa: PLR0917
    basis: Basis, length: int, axis: int, side: int, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What blocks of a side are multiplied by, [6, side, side] for terms (axis 1) and [2, side, side] for rows.

    The first is for all blocks but the last, the second for that one, in which a smaller tile may be. The others make
    coefficients that begin ``offset`` behind the start of a block: 2 and 3 from that block, 4 and 5 from the next.
    """
    with constants():
        both = [_block(basis, side, side), _block(basis, (length - 1) % side + 1, side)]
        if axis == 0:
            both = [matrix.T for matrix in both]
        shifted = [torch.zeros(side, side, dtype=torch.float64) for _ in range(4 if axis else 0)]
        for number, matrix in enumerate(both if offset else ()):
            shifted[number][: side - offset] = matrix[offset:]
            shifted[2 + number][side - offset :] = matrix[:offset]
        return torch.stack([*both, *shifted]).to(device=device, dtype=dtype)


def _block(basis: Basis, length: int, side: int) -> Tensor:
    """Tiles along the diagonal, [side, side] float64, and ones where less is left than a tile that can be."""
    block = torch.eye(side, dtype=torch.float64)
    for start in range(0, length, basis.tile):
        size = min(basis.tile, length - start)
        if TRANSFORMS[basis.transform].accepts(size):
            tile = TRANSFORMS[basis.transform].basis(size, dtype=torch.float64, device="cpu")
            block[start : start + size, start : start + size] = tile
    return block
