"""A few tokens times an int8 or int4 matrix on a CPU, in one call of a kernel.

While a language model writes, every layer multiplies one token, and its weights have pushed everything else out of the
caches: then Python between the steps of a product takes as long as the product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.matmul.activations import transform_matrix
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.int4 import Int4Form
from spectral_surgery.matmul.int8 import Int8Form
from spectral_surgery.matmul.recorded import unreadable
from spectral_surgery.transforms import IDENTITY, TRANSFORMS
from spectral_surgery.transforms.base import constants

MOST = 16  # tokens: with more, products of floating-point blocks are as fast
_ONE_THREAD = 1 << 17  # weights; waking a second thread takes as long as they do
_NO_TRANSFORM = 64  # rows of a task
_CPU = torch.device("cpu")


class _Tiles(NamedTuple):
    """How a side of a matrix is transformed: matrices [p, p] of its tiles, and of what is left, or None."""

    size: int
    whole: Tensor | None
    rest: Tensor | None

    def addresses(self) -> tuple[int, int]:
        """Of both; 0 where there is none."""
        whole, rest = (0 if matrix is None else matrix.data_ptr() for matrix in (self.whole, self.rest))
        return whole, rest


def few_tokens(x: Tensor, form: Form, bias: Tensor | None) -> Tensor | None:
    """Y = x Wᵀ + b, as exact as `form_matmul` says.

    Returns [..., O] in the dtype of x; None for whatever is not 1 to `MOST` tokens of finite numbers on a CPU without
    gradients, float32 or 16 bits, times an int8 or int4 form with four rows and 32 bytes in each.

    Args:
        x: [..., I].
        form: of W, [O, I].
        bias: [O] or None.
    """
    if not isinstance(form, Int8Form | Int4Form) or not _is_plain(x, form.shape[1]):
        return None
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous() or _wants_gradient(bias)):
        return None
    codes = form.codes
    from spectral_surgery.kernels import few_tokens as kernel

    if len(codes) < kernel.LEAST_ROWS or codes.shape[1] < kernel.LEAST_BYTES or not codes.is_contiguous():
        return None
    if x.dtype == torch.float16:
        y = few_tokens(x.float(), form, None if bias is None else bias.float())
        return None if y is None else y.half()
    flat = x.reshape(-1, form.shape[1]).contiguous()
    y = _product(flat, form, bias)
    return None if y is None else y.view(*x.shape[:-1], len(codes))


def _is_plain(x: Tensor, columns: int) -> bool:
    """Whether the numbers of x can be read from memory, and nothing else is wanted of the product."""
    if not x.is_cpu or x.dtype not in _TYPES or x.ndim == 0 or unreadable(x):
        return False
    if x.shape[-1] != columns or not 0 < x.numel() <= MOST * columns or _wants_gradient(x):
        return False
    return not torch.is_autocast_enabled("cpu") and not x.is_neg()


_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _product(x: Tensor, form: Int8Form | Int4Form, bias: Tensor | None) -> Tensor | None:
    from spectral_surgery.kernels import dots
    from spectral_surgery.kernels import few_tokens as kernel
    from spectral_surgery.kernels.threads import run

    rows, columns = form.shape
    tokens, half = len(x), x.dtype == torch.bfloat16
    into, back = _tiles(form.basis, columns, 1), _tiles(form.basis, rows, 0)
    work = torch.empty(kernel.work_bytes(tokens, columns), dtype=torch.uint8)
    y = x.new_empty((tokens, rows))
    job = kernel.Job(
        tokens=tokens, rows=rows, columns=columns, bfloat16=half, planes=1 if half else 2, finite=1,
        x=x.data_ptr(), y=y.data_ptr(), work=work.data_ptr(), bias=0 if bias is None else bias.data_ptr(),
        levels=form.codes.data_ptr(), scale=form.scale.data_ptr(), scales=form.scale.numel(),
        tile=into.size, row_tile=back.size,
    )  # fmt: skip
    job.into, job.rest_into = into.addresses()
    job.back, job.rest_back = back.addresses()
    if isinstance(form, Int4Form):
        job.parts, job.shift = form.grid.tolist()
        job.kind = dots.POINTS if (job.parts, job.shift) != (1, 0) else dots.NIBBLES
        if len(form.places):
            job.outliers, job.wide_places = len(form.places), form.places.dtype == torch.int64
            job.places, job.beyond = form.places.data_ptr(), form.beyond.data_ptr()
    threads = torch.get_num_threads() if rows * columns >= _ONE_THREAD else 1
    run(kernel.prepare, job, min(threads, tokens))
    if job.finite and job.coarse and job.planes == 1:
        job.planes, job.counter = 2, 0
        run(kernel.prepare, job, min(threads, tokens))
    if not job.finite:
        return None
    job.counter = 0
    run(kernel.multiply, job, threads)
    return y


@lru_cache(maxsize=1024)
def _tiles(basis: Basis, length: int, axis: int) -> _Tiles:
    """Of an axis of a matrix: from space along columns, to space along rows."""
    if axis not in basis.axes or basis.transform == IDENTITY.name:
        return _Tiles(_NO_TRANSFORM, None, None)
    rest = length % basis.tile
    sides = [basis.tile if length >= basis.tile else 0, rest if TRANSFORMS[basis.transform].accepts(rest) else 0]
    with constants():
        whole, last = (
            transform_matrix(basis.transform, side, torch.float32, _CPU, axis == 0).contiguous() if side else None
            for side in sides
        )
    return _Tiles(basis.tile, whole, last)
