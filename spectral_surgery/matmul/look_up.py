"""Rows of a weight on a CPU, as an embedding looks them up, in one call of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.int4 import Int4Form
from spectral_surgery.matmul.int5 import Int5Form
from spectral_surgery.matmul.int8 import Int8Form
from spectral_surgery.matmul.matrix_job import ONE_THREAD, matrix_job, readable
from spectral_surgery.matmul.unreadable import unreadable


def look_up(form: Form, numbers: Tensor) -> Tensor | None:
    """Rows of W, from all rows of their tiles.

    Returns [n, I] float32; None for other forms than int4, int5 and int8, and where these are not `readable`.

    Args:
        numbers: [n] int64, of rows.
    """
    if not isinstance(form, Int4Form | Int5Form | Int8Form) or not readable(form):
        return None
    if not numbers.is_cpu or unreadable(numbers):
        return None
    from spectral_surgery.kernels.rows import look_up as kernel
    from spectral_surgery.kernels.threads import run

    columns = form.shape[1]
    numbers = numbers.contiguous()
    out = torch.empty((len(numbers), columns))
    job = matrix_job(form, look_up=True)
    job.tokens, job.x, job.y = len(numbers), numbers.data_ptr(), out.data_ptr()
    run(kernel, job, torch.get_num_threads() if out.numel() * job.row_tile >= ONE_THREAD else 1)
    return out
