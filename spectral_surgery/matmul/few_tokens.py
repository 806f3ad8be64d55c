"""A few tokens times an int8 or int4 matrix on a CPU, in one call of a kernel.

While a language model writes, every layer multiplies one token, and its weights have pushed everything else out of the
caches: then Python between the steps of a product takes as long as the product. In small layers it does for a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spectral_surgery.matmul.coded import CodedForm
from spectral_surgery.matmul.dispatch import most_tokens
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.level_form import LevelForm
from spectral_surgery.matmul.matrix_job import ONE_THREAD, coded_job, product_job
from spectral_surgery.matmul.planes import LAYOUTS, NIBBLES
from spectral_surgery.matmul.unreadable import unreadable

if TYPE_CHECKING:
    from spectral_surgery.kernels.matrix import Job

_LEAST_ROWS = 4  # what a kernel takes at once


def few_tokens(x: Tensor, form: Form, bias: Tensor | None) -> Tensor | None:
    """Y = x Wᵀ + b, as exact as `form_matmul` says.

    Returns [..., O] in the dtype of x; None for whatever is not 1 to `dispatch.most_tokens` of finite numbers on a CPU
    without gradients, float32 or 16 bits, times levels of 4, 5, 8 or 12 bits, of four rows and 32 bytes in each.

    Args:
        x: [..., I].
        form: of W, [O, I].
        bias: [O] or None.
    """
    if not isinstance(form, LevelForm | CodedForm) or not _is_plain(x, form.shape):
        return None
    if bias is not None and not _is_plain_bias(bias, x.dtype, form.shape[0]):
        return None
    if form.shape[0] < _LEAST_ROWS:
        return None
    if isinstance(form, LevelForm) and LAYOUTS[form.layout].wide:
        return _two_planes(x, form, bias)
    if x.dtype == torch.float16:
        y = few_tokens(x.float(), form, None if bias is None else bias.float())
        return None if y is None else y.half()
    return _product(x.contiguous(), form, bias)


def _two_planes(x: Tensor, form: LevelForm, bias: Tensor | None) -> Tensor | None:
    """Twelve bits as eight and four, added up in float32."""
    parts = [few_tokens(x.float(), plane, None) for plane in form.digits()]
    if parts[0] is None or parts[1] is None or len(form.places):
        return None
    y = torch.add(parts[1], parts[0], alpha=1 << NIBBLES.bits)
    return (y if bias is None else y + bias).to(x.dtype)


def _is_plain(x: Tensor, shape: tuple[int, int]) -> bool:
    """Whether the numbers of x can be read from memory, and nothing else is wanted of the product."""
    if not x.is_cpu or x.dtype not in _TYPES or x.ndim == 0 or unreadable(x):
        return False
    rows, columns = shape
    if x.shape[-1] != columns or _wants_gradient(x):
        return False
    if not 0 < x.numel() <= most_tokens(rows * columns, x.dtype) * columns:
        return False
    if x.is_neg() or x._is_zerotensor() or torch.is_autocast_enabled("cpu"):
        return False
    return forward_ad._current_level < 0


def _is_plain_bias(bias: Tensor, dtype: torch.dtype, rows: int) -> bool:
    if bias.dtype != dtype or bias.shape != (rows,) or not bias.is_cpu or _wants_gradient(bias) or unreadable(bias):
        return False
    return bias.is_contiguous() and not bias.is_neg() and not bias._is_zerotensor()


_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _product(x: Tensor, form: LevelForm | CodedForm, bias: Tensor | None) -> Tensor | None:
    kernels, (rows, columns), half = _kernels(), form.shape, x.dtype == torch.bfloat16
    tokens = x.numel() // columns
    job = coded_job(form) if isinstance(form, CodedForm) else product_job(form)
    if job is None:
        return None
    work = torch.empty(kernels.work_bytes(tokens, columns), dtype=torch.uint8, device="cpu")
    y = x.new_empty((*x.shape[:-1], rows))
    job.tokens, job.bfloat16, job.planes, job.finite = tokens, half, 1 if half else 2, 1
    job.x, job.y, job.work = x.data_ptr(), y.data_ptr(), work.data_ptr()
    if bias is not None:
        job.bias = bias.data_ptr()
    threads = torch.get_num_threads() if rows * columns >= ONE_THREAD else 1
    kernels.run(kernels.prepare, job, min(threads, tokens))
    if job.finite and job.coarse and job.planes == 1:
        job.planes, job.counter = 2, 0
        kernels.run(kernels.prepare, job, min(threads, tokens))
    if not job.finite:
        return None
    job.counter = 0
    kernels.run(_multiply_frames() if job.frames else kernels.multiply, job, threads)
    return y if job.finite else None


class _Kernels(NamedTuple):
    """What is imported, and compiled, when it is first used; to import it at each call would take 1 us each."""

    prepare: int
    multiply: int
    run: Callable[[int, Job, int], None]
    work_bytes: Callable[[int, int], int]


@lru_cache(maxsize=1)
def _kernels() -> _Kernels:
    from spectral_surgery.kernels.few_tokens import multiply, prepare, work_bytes
    from spectral_surgery.kernels.threads import run

    return _Kernels(prepare, multiply, run, work_bytes)


@lru_cache(maxsize=1)
def _multiply_frames() -> int:
    from spectral_surgery.kernels.coded import multiply_frames

    return multiply_frames
