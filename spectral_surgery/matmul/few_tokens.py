"""A few tokens times an int8 or int4 matrix on a CPU, in one call of a kernel.

While a language model writes, every layer multiplies one token, and its weights have pushed everything else out of the
caches: then Python between the steps of a product takes as long as the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.int4 import Int4Form
from spectral_surgery.matmul.int8 import Int8Form
from spectral_surgery.matmul.matrix_job import ONE_THREAD, matrix_job
from spectral_surgery.matmul.recorded import unreadable

MOST = 16  # tokens: with more, products of floating-point blocks are as fast


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
    from spectral_surgery.kernels.matrix import LEAST_BYTES, LEAST_ROWS

    if len(codes) < LEAST_ROWS or codes.shape[1] < LEAST_BYTES or not codes.is_contiguous():
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
    from spectral_surgery.kernels import few_tokens as kernel
    from spectral_surgery.kernels.threads import run

    rows, columns = form.shape
    tokens, half = len(x), x.dtype == torch.bfloat16
    job = matrix_job(form)
    work = torch.empty(kernel.work_bytes(tokens, columns), dtype=torch.uint8)
    y = x.new_empty((tokens, rows))
    job.tokens, job.bfloat16, job.planes, job.finite = tokens, half, 1 if half else 2, 1
    job.x, job.y, job.work = x.data_ptr(), y.data_ptr(), work.data_ptr()
    if bias is not None:
        job.bias = bias.data_ptr()
    threads = torch.get_num_threads() if rows * columns >= ONE_THREAD else 1
    run(kernel.prepare, job, min(threads, tokens))
    if job.finite and job.coarse and job.planes == 1:
        job.planes, job.counter = 2, 0
        run(kernel.prepare, job, min(threads, tokens))
    if not job.finite:
        return None
    job.counter = 0
    run(kernel.multiply, job, threads)
    return y
