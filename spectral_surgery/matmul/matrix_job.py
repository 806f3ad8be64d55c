"""What the kernels of a CPU are told of a form, and its levels read by them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.activations import transform_matrix
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.unreadable import unreadable
from spectral_surgery.transforms import IDENTITY, TRANSFORMS
from spectral_surgery.transforms.base import constants

if TYPE_CHECKING:
    from spectral_surgery.kernels.matrix import Job

ONE_THREAD = 1 << 17  # weights; waking a second thread takes as long as they do
_KEPT = "_product_job"
_NO_TRANSFORM = 64  # rows of a task
_CPU = torch.device("cpu")


class Kind(NamedTuple):
    """How levels are held: a name in `kernels.vectors`, and the grid of nibbles."""

    name: str
    parts: int
    shift: int


class Levels(Form, Protocol):
    """A form whose levels kernels can read.

    Attributes:
        codes: [O, I] or [O, ceil(I / 2)] int8.
        places: of outliers, [n].
        beyond: what their levels go beyond others by, [n] int8 or float32.
        kind: of its levels; None for those that kernels cannot read.
    """

    @property
    def codes(self) -> Tensor:
        """See Levels."""
        ...

    @property
    def places(self) -> Tensor:
        """See Levels."""
        ...

    @property
    def beyond(self) -> Tensor:
        """See Levels."""
        ...

    @property
    def kind(self) -> Kind | None:
        """See Levels."""
        ...


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


def product_job(form: Levels) -> Job:
    """A new `matrix_job` for a product; what it is a copy of is kept with the form, since to fill one takes 5 us."""
    kept: Job | None = vars(form).get(_KEPT)
    if kept is None or kept.levels != form.codes.data_ptr():  # a copy of a form has other tensors
        kept = matrix_job(form)
        object.__setattr__(form, _KEPT, kept)
    return type(kept).from_buffer_copy(kept)


def matrix_job(form: Levels, *, look_up: bool = False) -> Job:
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
    kind, job.parts, job.shift = cast(Kind, form.kind)
    job.kind = getattr(vectors, kind)
    lowest = getattr(form, "lowest", None)
    if lowest is not None:
        job.lowest = lowest.data_ptr()
    if len(form.row_scale):
        job.row_scale = form.row_scale.data_ptr()
    if len(form.places):
        job.outliers, job.wide_places = len(form.places), form.places.dtype == torch.int64
        job.places, job.beyond = form.places.data_ptr(), form.beyond.data_ptr()
        job.wide_beyond = form.beyond.dtype == torch.float32
    return job


def read_levels(form: Levels, start: int, stop: int) -> Tensor | None:
    """Levels of consecutive rows without outliers, [stop - start, I] int8; None where kernels cannot read them."""
    if not readable(form):
        return None
    from spectral_surgery.kernels.rows import read_levels as kernel
    from spectral_surgery.kernels.threads import run

    out, numbers = torch.empty((stop - start, form.shape[1]), dtype=torch.int8), torch.arange(start, stop)
    job = product_job(form)
    job.tokens, job.x, job.y = len(out), numbers.data_ptr(), out.data_ptr()
    run(kernel, job, torch.get_num_threads())
    return out


def readable(form: Levels) -> bool:
    """Whether kernels can read rows of levels: on a CPU, of 32 bytes or more, and no half of a byte left over."""
    codes = form.codes
    even = codes.shape[1] == form.shape[1] or not form.shape[1] % 2
    wide = codes.shape[1] >= 32 and codes.is_contiguous()
    return codes.is_cpu and even and wide and form.kind is not None and not unreadable(codes)


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
