"""What the kernels of a CPU are told of an int8 or int4 form."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.activations import transform_matrix
from spectral_surgery.matmul.int4 import Int4Form
from spectral_surgery.matmul.int8 import Int8Form
from spectral_surgery.transforms import IDENTITY, TRANSFORMS
from spectral_surgery.transforms.base import constants

if TYPE_CHECKING:
    from spectral_surgery.kernels.matrix import Job

ONE_THREAD = 1 << 17  # weights; waking a second thread takes as long as they do
_KEPT = "_product_job"
_NO_TRANSFORM = 64  # rows of a task
_CPU = torch.device("cpu")


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


def product_job(form: Int8Form | Int4Form) -> Job:
    """A new `matrix_job` for a product; what it is a copy of is kept with the form, since to fill one takes 5 us."""
    kept: Job | None = vars(form).get(_KEPT)
    if kept is None or kept.levels != form.codes.data_ptr():  # a copy of a form has other tensors
        kept = matrix_job(form)
        object.__setattr__(form, _KEPT, kept)
    return type(kept).from_buffer_copy(kept)


def matrix_job(form: Int8Form | Int4Form, *, look_up: bool = False) -> Job:
    """A job with the fields of the matrix.

    Args:
        form: its tensors must stay while the job is used.
        look_up: whether columns are turned back into space, and not activations into the spectrum.
    """
    from spectral_surgery.kernels import vectors
    from spectral_surgery.kernels.matrix import Job

    rows, columns = form.shape
    into, back = _tiles(form.basis, columns, 1, look_up), _tiles(form.basis, rows, 0, True)
    job = Job(
        rows=rows,
        columns=columns,
        levels=form.codes.data_ptr(),
        scale=form.scale.data_ptr(),
        scales=form.scale.numel(),
        tile=into.size,
        into=into.whole,
        rest_into=into.rest,
        row_tile=back.size,
        back=back.whole,
        rest_back=back.rest,
    )
    if isinstance(form, Int4Form):
        job.parts, job.shift = form.grid.tolist()
        job.kind = vectors.POINTS if (job.parts, job.shift) != (1, 0) else vectors.NIBBLES
    if len(form.row_scale):
        job.row_scale = form.row_scale.data_ptr()
    if len(form.places):
        job.outliers, job.wide_places = len(form.places), form.places.dtype == torch.int64
        job.places, job.beyond = form.places.data_ptr(), form.beyond.data_ptr()
        job.wide_beyond = form.beyond.dtype == torch.float32
    return job


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
