"""Rows of a weight, as an embedding looks them up; on a CPU in one call of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_surgery.errors import ShapeError
from spectral_surgery.matmul.form import Form, coefficients
from spectral_surgery.matmul.level_form import LevelForm
from spectral_surgery.matmul.matrix_job import ONE_THREAD, matrix_job, readable, whole_bytes
from spectral_surgery.matmul.unreadable import unreadable
from spectral_surgery.transforms import TRANSFORMS, tiles


def look_up(form: Form, numbers: Tensor) -> Tensor | None:
    """Rows of W, from all rows of their tiles.

    Returns [n, I] float32; None for other forms than int4, int5 and int8, and where these are not `readable`.

    Args:
        numbers: [n] int64, of rows.
    """
    if not isinstance(form, LevelForm) or not whole_bytes(form) or not readable(form):
        return None
    if not numbers.is_cpu or unreadable(numbers):
        return None
    from spectral_surgery.kernels.rows import look_up as kernel
    from spectral_surgery.kernels.threads import run

    columns = form.shape[1]
    numbers = numbers.contiguous()
    out = torch.empty((len(numbers), columns), dtype=torch.float32, device="cpu")
    job = matrix_job(form, look_up=True)
    job.tokens, job.x, job.y = len(numbers), numbers.data_ptr(), out.data_ptr()
    run(kernel, job, torch.get_num_threads() if out.numel() * job.row_tile >= ONE_THREAD else 1)
    return out


def rows_of(ids: Tensor, forms: Sequence[Form]) -> Tensor:
    """Rows of W, held in one or more forms: [...] integers to [..., I] float32.

    Raises ShapeError when a row is not in the matrix, on a CPU.
    """
    rows, columns = sum(form.shape[0] for form in forms), forms[0].shape[1]
    flat = ids.reshape(-1).long()
    if flat.is_cpu and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < rows:
        raise ShapeError(f"rows: {int(flat.min())} to {int(flat.max())} were asked for; expected 0 to {rows - 1}.")
    if len(forms) == 1:
        return _rows(forms[0], flat).reshape(*ids.shape, columns)
    out = torch.empty(len(flat), columns, device=flat.device)
    start = 0
    for form in forms:
        here = (flat >= start) & (flat < start + form.shape[0])
        out[here] = _rows(form, flat[here] - start)
        start += form.shape[0]
    return out.reshape(*ids.shape, columns)


def _rows(form: Form, rows: Tensor) -> Tensor:
    quick = look_up(form, rows)
    if quick is not None:
        return quick
    basis = form.basis
    if 0 not in basis.axes:
        return tiles.inverse(coefficients(form, rows), TRANSFORMS[basis.transform], basis.tile, basis.axes)
    out = torch.empty(len(rows), form.shape[1], device=rows.device)
    tile_of = rows // basis.tile
    for tile in sorted(set(tile_of.tolist())):
        start = tile * basis.tile
        dense = _decoded(form, start, min(start + basis.tile, form.shape[0]))
        here = tile_of == tile
        out[here] = dense[rows[here] - start]
    return out


def _decoded(form: Form, start: int, stop: int) -> Tensor:
    """Dense rows from whole tiles."""
    return form.basis.inverse(coefficients(form, torch.arange(start, stop, device=form.scale.device)))
