"""Products of levels on a GPU, each in one launch of a kernel of `spectral_surgery.gpu`, and what these are told."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.activations import to_space, to_spectrum
from spectral_surgery.matmul.dispatch import transform_dtype, way
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.gpu_rules import (
    DIGITS,
    Chip,
    Cut,
    Matrix,
    Planes,
    chip_of,
    few_at_most,
    few_constants,
    few_cut,
    fits,
    many_constants,
    many_cut,
    mixing,
)
from spectral_surgery.matmul.planes import BITS, BYTES, LAYOUTS, NIBBLES
from spectral_surgery.matmul.unreadable import unreadable
from spectral_surgery.transforms import IDENTITY, TRANSFORMS
from spectral_surgery.transforms.base import constants

_BITS = 16  # columns: of a multiple of them, half a row has whole bytes of bits
_COUNTERS = 1 << 14  # groups of rows of one launch at most
_ALIGNED = 16  # bytes
_WAVE = 64  # threads of a warp of AMD's chips for servers
_KEPT = "_gpu_matrix"


class _Kept:
    """What a product wants to know of a form, asked once, since a look at numbers on a GPU waits for it.

    Attributes:
        key: addresses of its tensors.
        matrix: what kernels are told of it; None where they cannot read it.
        starts: by rows of a program, the first outlier of each block of rows: [blocks + 1] int32 or int64.
    """

    def __init__(self, key: tuple[int, ...], matrix: Matrix | None) -> None:
        self.key, self.matrix = key, matrix
        self.starts: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # copies and pickles of the form go without it
        return type(None), ()


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
        kept = _kept(form) if codes is not None and codes.device == x.device else None
        if kept is None or kept.matrix is None or not fits(form.basis):
            return None
        stop = row + form.shape[0]
        rest = None if bias is None else bias[row:stop]
        few = 0 < len(x) <= few_at_most(kept.matrix, x.dtype, _chip(x.device))
        parts.append((_few_tokens if few else _many_tokens)(x, form, kept.matrix, kept, rest))
        row = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def expert_products(x: Tensor, forms: Sequence[Sequence[Form]], counts: Sequence[int]) -> Tensor | None:
    """Each row of x times the matrix of its expert, transposed: [S, O] in the dtype of x, in one launch.

    Returns None where `product` would, where an expert has several forms or more than 16 tokens, and where experts
    differ in what their kernels are compiled for.

    Args:
        x: [S, I] floating, the rows of the first expert first.
        forms: of each expert.
        counts: rows of each expert.
    """
    gradient = x.requires_grad and torch.is_grad_enabled()
    if x.dtype not in DIGITS or way(x.device.type, x.shape[1], x.dtype) != "triton" or gradient or unreadable(x):
        return None
    hit: list[tuple[Any, int]] = [(own[0], count) for own, count in zip(forms, counts, strict=True) if count]
    if not hit or any(len(own) != 1 for own in forms) or not all(_stands_on(form, x.device) for form, _ in hit):
        return None
    some = [(form, _kept(form), count) for form, count in hit]
    sparse = any(kept.matrix is not None and kept.matrix.outliers for _, kept, _ in some)
    kinds = {(kept.matrix and kept.matrix._replace(outliers=sparse), form.places.dtype) for form, kept, _ in some}
    matrix = kinds.pop()[0]
    most = max(count for _, count in hit)
    if matrix is None or kinds or not fits(matrix.basis) or most > few_at_most(matrix, x.dtype, _chip(x.device)):
        return None
    return _experts(_rows_together(x), matrix, some)


def _stands_on(form: Any, device: torch.device) -> bool:
    """Whether a form has levels on a device, where loads of sixteen bytes may begin."""
    if not isinstance(getattr(form, "codes", None), Tensor) or form.codes.device != device:
        return False
    return not any(one.data_ptr() % _ALIGNED for one in (form.codes, form.lowest, form.scale, form.row_scale))


def _experts(x: Tensor, matrix: Matrix, hit: Sequence[tuple[Any, _Kept, int]]) -> Tensor:
    from spectral_surgery.gpu.experts import experts

    c = few_cut(matrix, max(count for *_, count in hit), x.dtype, _chip(x.device), len(hit))
    jobs, first = [], 0
    for form, kept, count in hit:
        starts = _starts(form, matrix, kept, c.rows) if matrix.outliers else form.scale
        tensors = (form.codes, form.lowest, form.scale, form.row_scale, form.places, form.beyond, starts)
        jobs.append([*(tensor.data_ptr() for tensor in tensors), first, count])
        first += count
    y, unused = x.new_empty((len(x), matrix.rows)), hit[0][0].scale
    groups = -(-matrix.rows // (c.rows * c.blocks))
    sums = unused.new_empty(len(hit) * groups * c.splits * c.blocks * c.rows * c.tokens)
    counters = _counters(x.device, len(hit) * groups) if c.splits > 1 else unused
    fixed = few_constants(matrix, c, x.dtype, bias=False, backend=_backend())
    into, back = _both_sides(matrix, c, x, fixed, unused)
    places = hit[0][0].places
    with _on(x):
        experts[(groups, c.splits, len(hit))](
            *(x, _sent(jobs, x.device), into, back, sums, counters, y),
            *(matrix.rows, matrix.terms, matrix.width, x.stride(0)),
            **fixed,
            WIDE=places.dtype == torch.int64,
            num_warps=c.warps,
            num_stages=c.stages,
        )
    return y


def _sent(numbers: list[list[int]], device: torch.device) -> Tensor:
    """Numbers on a device, for which nobody waits."""
    here = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def level_product(x: Tensor, codes: Tensor) -> Tensor:
    """X Mᵀ: [T, K] and [r, K] int8, with any strides, to [T, r] float32; nothing is transformed."""
    one = _one(x.device)
    form = _Plain(codes, one[:0], one, one[:0], one[:0], one[:0])
    matrix = Matrix(len(codes), x.shape[1], Planes(True, False, False), Basis(IDENTITY.name, 1, ()))
    y = x.new_empty((len(x), len(codes)), dtype=torch.float32)
    return _levels_times(x, form, matrix, _Kept((), matrix), y)


class _Plain(NamedTuple):
    """Levels of which nothing but a product is wanted; see `LevelForm`."""

    codes: Tensor
    lowest: Tensor
    scale: Tensor
    row_scale: Tensor
    places: Tensor
    beyond: Tensor


def _few_tokens(x: Tensor, form: Any, matrix: Matrix, kept: _Kept, bias: Tensor | None) -> Tensor:
    from spectral_surgery.gpu.few_tokens import few_tokens

    y = x.new_empty((len(x), matrix.rows))
    x, c, unused = _rows_together(x), few_cut(matrix, len(x), x.dtype, _chip(x.device)), form.scale
    groups = -(-matrix.rows // (c.rows * c.blocks))
    sums = unused.new_empty(groups * c.splits * c.blocks * c.rows * c.tokens)
    counters = _counters(x.device, groups) if c.splits > 1 else unused
    fixed = few_constants(matrix, c, x.dtype, bias is not None, _backend())
    into, back = _both_sides(matrix, c, x, fixed, unused)
    tensors = (x, form.codes, form.lowest, into, back, form.scale, form.row_scale, unused if bias is None else bias)
    sparse = (form.places, form.beyond, _starts(form, matrix, kept, c.rows) if matrix.outliers else unused)
    numbers = (len(x), matrix.rows, matrix.terms, matrix.width, x.stride(0))
    with _on(x):
        few_tokens[(groups, c.splits)](
            *tensors, *sparse, sums, counters, y, *numbers, **fixed, num_warps=c.warps, num_stages=c.stages
        )
    return y


def _both_sides(matrix: Matrix, c: Cut, x: Tensor, fixed: dict[str, Any], unused: Tensor) -> tuple[Tensor, Tensor]:
    """What activations and rows of the product are transformed by."""
    kind, basis = mixing(x.dtype), matrix.basis
    into = matrices(basis, matrix.terms, 1, c.terms, fixed["OFFSET"], kind, x.device) if fixed["FORWARD"] else unused
    back = matrices(basis, matrix.rows, 0, c.terms, 0, kind, x.device) if fixed["INVERSE"] else unused
    return into, back


def _many_tokens(x: Tensor, form: Any, matrix: Matrix, kept: _Kept, bias: Tensor | None) -> Tensor:
    """Transforms are a product apart: within the kernel their matrices leave too few registers to it."""
    y = x.new_empty((len(x), matrix.rows), dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32)
    wide = x.to(transform_dtype(x.device.type, len(x), x.dtype))  # tiles of float16 may have sums beyond float16
    inside = _levels_times(to_spectrum(wide, form.basis, 1), form, matrix, kept, y)
    outside = to_space(inside, form.basis, 0)
    return (outside if bias is None else outside + bias).to(x.dtype)


def _levels_times(x: Tensor, form: Any, matrix: Matrix, kept: _Kept, y: Tensor) -> Tensor:
    from spectral_surgery.gpu.product import product as kernel

    if not y.numel():
        return y
    x, c = _rows_together(x), many_cut(matrix, len(x), x.dtype, _chip(x.device))
    fixed = many_constants(matrix, c, x.dtype, _backend())
    starts = _starts(form, matrix, kept, c.rows) if matrix.outliers else form.scale
    tensors = (x, form.codes, form.lowest, form.scale, form.row_scale, form.places, form.beyond, starts, y)
    numbers = (len(x), matrix.rows, matrix.terms, matrix.width, x.stride(0), *form.codes.stride())
    with _on(x):
        kernel[-(-matrix.rows // c.rows), -(-len(x) // c.tokens)](
            *tensors, *numbers, **fixed, num_warps=c.warps, num_stages=c.stages
        )
    return y


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=16)
def _chip(device: torch.device) -> Chip:
    """Which kind of chip a device is; that of Triton's interpreter is any."""
    if torch.version.hip is not None:
        return "amd" if torch.cuda.get_device_properties(device).warp_size == _WAVE else "rdna"
    return chip_of(torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0))


def _backend() -> str:
    """What kernels are compiled for."""
    from spectral_surgery.gpu.parts import INTERPRETED

    return "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _kept(form: Any) -> _Kept:
    key = tuple(tensor.data_ptr() for tensor in (form.codes, form.lowest, form.scale, form.row_scale, form.places))
    kept: _Kept | None = vars(form).get(_KEPT)
    if kept is None or kept.key != key:
        kept = _Kept(key, _matrix(form))
        object.__setattr__(form, _KEPT, kept)
    return kept


def _matrix(form: Any) -> Matrix | None:
    layout, (rows, terms) = LAYOUTS[form.layout], form.shape
    bits = BITS in layout.planes
    if form.host is not None or (bits and terms % _BITS):
        return None
    planes = Planes(BYTES in layout.planes, NIBBLES in layout.planes, bits, form.points.parts, form.points.shift)
    has = (form.scale.numel() > 1, len(form.row_scale) > 0, len(form.places) > 0)
    return Matrix(rows, terms, planes, form.basis, *has)


def _starts(form: Any, matrix: Matrix, kept: _Kept, height: int) -> Tensor:
    if height not in kept.starts:
        edges = torch.arange(0, matrix.rows + height, height, dtype=torch.int64, device=form.places.device)
        kept.starts[height] = torch.searchsorted(form.places.long(), edges * matrix.terms)
    return kept.starts[height]


def _counters(device: torch.device, count: int) -> Tensor:
    """[count] int32 zeros or more, for the programs of one launch at a time."""
    if count > _COUNTERS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=device)  # a graph may run beside this stream
    return _stream_counters(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@lru_cache(maxsize=64)
def _stream_counters(device: torch.device, stream: int) -> Tensor:  # noqa: ARG001, one for each stream
    with constants():
        return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _one(device: torch.device) -> Tensor:
    with constants():
        return torch.ones(1, device=device)


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
