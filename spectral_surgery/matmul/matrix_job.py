"""What the kernels of a CPU are told of a form, and its levels read by them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.activations import transform_matrix
from spectral_surgery.matmul.levels import grid_of
from spectral_surgery.matmul.unreadable import unreadable
from spectral_surgery.transforms import IDENTITY, TRANSFORMS
from spectral_surgery.transforms.base import constants

if TYPE_CHECKING:
    from spectral_surgery.kernels.matrix import Job
    from spectral_surgery.matmul.coded import CodedForm
    from spectral_surgery.matmul.form import Form
    from spectral_surgery.matmul.level_form import LevelForm

ONE_THREAD = 1 << 17  # weights; waking a second thread takes as long as they do
_KEPT = "_product_job"
_LEAST_BYTES = 32  # of a row: the widest chunk that `kernels.vectors` reads
_NO_TRANSFORM = 64  # rows of a task
_CPU = torch.device("cpu")


class Kind(NamedTuple):
    """How levels are held: a name in `kernels.vectors`, and the grid of nibbles."""

    name: str
    parts: int
    shift: int


class _Tiles(NamedTuple):
    """How one side of a matrix is transformed.

    Attributes:
        size: of a tile.
        whole: address of the matrix [size, size] that tiles are multiplied by, or 0.
        rest: the same for what is left beyond whole tiles.
        matrices: which hold the memory.
    """

    size: int
    whole: int
    rest: int
    matrices: tuple[Tensor | None, ...]


class _Kept:
    """A job for products with a form, which takes 5 us to fill; copies and pickles of the form go without it.

    Attributes:
        key: addresses and numbers that it was filled with.
        job: None where kernels cannot read the form.
        tiles: the matrices whose addresses it has.
    """

    def __init__(self, key: tuple[int, ...], job: Job | None, tiles: object) -> None:
        self.key, self.job, self.tiles = key, job, tiles

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def product_job(form: LevelForm) -> Job | None:
    """A new `matrix_job` for a product; None where kernels cannot read the form."""
    tensors = _tensors(form)
    key = (*[tensor.data_ptr() for tensor in tensors], *(form.grid.tolist() if form.grid.is_cpu else ()))
    kept: _Kept | None = vars(form).get(_KEPT)
    if kept is None or kept.key != key:
        job = matrix_job(form) if readable(form) else None
        tiles = [_tiles(form.basis, length, axis, axis == 0) for axis, length in enumerate(form.shape)]
        kept = _Kept(key, job, tiles)
        object.__setattr__(form, _KEPT, kept)
    return None if kept.job is None else type(kept.job).from_buffer_copy(kept.job)


def _tensors(form: LevelForm) -> list[Tensor]:
    """Those whose addresses a job has."""
    return [form.codes, form.lowest, form.scale, form.row_scale, form.places, form.beyond]


def matrix_job(form: LevelForm, *, look_up: bool = False) -> Job:
    """A job with the fields of the matrix.

    Args:
        form: its tensors must stay while the job is used.
        look_up: whether columns are turned back into space, and not activations into the spectrum.
    """
    from spectral_surgery.kernels import vectors

    job = _sides(form, look_up)
    job.levels, job.lowest = form.codes.data_ptr(), form.lowest.data_ptr()
    kind, job.parts, job.shift = cast(Kind, form.kind)
    job.kind = getattr(vectors, kind)
    if len(form.places):
        job.outliers, job.wide_places = len(form.places), form.places.dtype == torch.int64
        job.places, job.beyond = form.places.data_ptr(), form.beyond.data_ptr()
        job.wide_beyond = form.beyond.dtype == torch.float32
    return job


def coded_job(form: CodedForm) -> Job | None:
    """A job with the fields of frames, whose codes kernels decode; None where they cannot read the form, or int8."""
    from spectral_surgery.kernels import vectors

    grid, tensors = grid_of(float(form.offset)), (form.data, form.ends, form.starts, form.scale, form.row_scale)
    if grid is None or form.shape[1] < _LEAST_BYTES or not _in_memory(tensors) or not _in_bounds(form):
        return None
    job, heights = _sides(form, False), form.starts.diff()
    job.kind, job.parts, job.shift = vectors.BYTES, grid.parts, grid.shift
    job.frames, job.most_rows = len(heights), int(heights.max())
    job.data, job.ends, job.starts = form.data.data_ptr(), form.ends.data_ptr(), form.starts.data_ptr()
    return job


def _in_bounds(form: CodedForm) -> bool:
    """Whether tensors are of the types and lengths that a job stands for, and frames within the data and the rows."""
    (rows, columns), sides = form.shape, (form.scale.dtype, form.row_scale.dtype)
    types = (form.data.dtype, form.ends.dtype, form.starts.dtype, *sides)
    if types != (torch.uint8, torch.int64, torch.int64, torch.float32, torch.float32):
        return False
    if form.scale.numel() not in (1, columns) or form.row_scale.numel() not in (0, rows):
        return False
    ends, starts = form.ends.tolist(), form.starts.tolist()
    ascending = len(ends) == len(starts) > 1 and ends == sorted(ends) and starts == sorted(starts)
    return ascending and ends[0] >= 0 and ends[-1] <= form.data.numel() and (starts[0], starts[-1]) == (0, rows)


def _sides(form: Form, look_up: bool) -> Job:
    """A job with all that is not the levels."""
    from spectral_surgery.kernels.matrix import Job

    rows, columns = form.shape
    into, back = _tiles(form.basis, columns, 1, look_up), _tiles(form.basis, rows, 0, True)
    return Job(
        rows=rows,
        columns=columns,
        scale=form.scale.data_ptr(),
        scales=form.scale.numel(),
        row_scale=form.row_scale.data_ptr() if len(form.row_scale) else 0,
        tile=into.size,
        into=into.whole,
        rest_into=into.rest,
        row_tile=back.size,
        back=back.whole,
        rest_back=back.rest,
    )


def read_levels(form: LevelForm, start: int, stop: int) -> Tensor | None:
    """Levels of consecutive rows without outliers, [stop - start, I] int8; None where kernels cannot read them."""
    job = product_job(form)
    if job is None or not whole_bytes(form):
        return None
    from spectral_surgery.kernels.rows import read_levels as kernel
    from spectral_surgery.kernels.threads import run

    out = torch.empty((stop - start, form.shape[1]), dtype=torch.int8, device=_CPU)
    numbers = torch.arange(start, stop, dtype=torch.int64, device=_CPU)
    job.tokens, job.x, job.y = len(out), numbers.data_ptr(), out.data_ptr()
    run(kernel, job, torch.get_num_threads())
    return out


def readable(form: LevelForm) -> bool:
    """Whether kernels can read the tensors of a form: on a CPU, of the types that a job stands for, 32 bytes a row."""
    if form.kind is None:
        return False
    (rows, columns), codes, places = form.shape, form.codes, form.places
    fits = form.scale.numel() in (1, columns) and form.row_scale.numel() in (0, rows)
    types = form.scale.dtype == form.row_scale.dtype == torch.float32 and codes.dtype == torch.int8
    sparse = len(places) == len(form.beyond) and places.dtype in (torch.int32, torch.int64)
    sparse = sparse and form.beyond.dtype in (torch.int8, torch.float32)
    if not (fits and types and sparse) or codes.shape[1] < _LEAST_BYTES:
        return False
    return _in_memory(_tensors(form))


def _in_memory(tensors: Iterable[Tensor]) -> bool:
    return all(one.is_cpu and one.is_contiguous() and not unreadable(one) and not one.is_neg() for one in tensors)


def whole_bytes(form: LevelForm) -> bool:
    """Whether no half of a byte of a row is left over."""
    return form.codes.shape[1] == form.shape[1] or not form.shape[1] % 2


@lru_cache(maxsize=1024)
def _tiles(basis: Basis, length: int, axis: int, inverse: bool) -> _Tiles:
    """Of an axis of a matrix of this length."""
    if axis not in basis.axes or basis.transform == IDENTITY.name:
        return _Tiles(_NO_TRANSFORM, 0, 0, ())
    rest = length % basis.tile
    sides = [basis.tile if length >= basis.tile else 0, rest if TRANSFORMS[basis.transform].accepts(rest) else 0]
    with constants():
        matrices = tuple(
            transform_matrix(basis.transform, side, torch.float32, _CPU, inverse).contiguous() if side else None
            for side in sides
        )
    whole, last = (0 if matrix is None else matrix.data_ptr() for matrix in matrices)
    return _Tiles(basis.tile, whole, last, matrices)
