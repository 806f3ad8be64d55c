"""The residual of a few tokens on a GPU: cosines and sines made where they are multiplied, and no FFT.

With x as its components along the waves of the coefficients, y is a sum of other waves with these as weights: a
low-rank product whose factors nobody stores. One launch for the components, one for the sum, and one more for the
gradient of the coefficients, where FFTs take ten. Sums are always taken in the same order.

Source: the definition in `reference`, term by term.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from spectral_surgery import gpu
from spectral_surgery.fourier.rfft_positions import Delta

_LONGEST = 1 << 16  # points of a wave whose angles are exact
_MOST = 1 << 25  # numbers of waves: by estimate, making them takes 40 µs of an H200, as ten launches do; run on none
_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def suits(x: Tensor, delta: Delta) -> bool:
    """Whether a GPU is at hand that this takes less time on than FFTs. ``x`` is [T, n]."""
    return x.is_cuda and gpu.available() and fits(len(x), x.dtype, delta)


def fits(tokens: int, dtype: torch.dtype, delta: Delta) -> bool:
    """The same, on any GPU."""
    from spectral_surgery.gpu.low_rank import TOKENS

    count, (rows, columns) = len(delta.coefficients), delta.shape
    waves = -(-tokens // TOKENS) * 2 * count * (rows + columns)
    exact = dtype in _TYPES and delta.coefficients.dtype in _TYPES and max(delta.shape) <= _LONGEST
    return exact and 0 < waves <= _MOST


def add_forward(y: Tensor, x: Tensor, delta: Delta, *, fresh: bool) -> None:
    """Add x ΔWᵀ in place, or write it.

    Args:
        y: [T, O], contiguous.
        x: [T, I].
        fresh: whether y has no numbers yet.
    """
    x, (_, into, out) = rows_together(x), delta.places.indices[:3]
    parts = components_of(x, into, 2 * len(into))
    _expand(y, parts, _waves(out, delta), fresh=fresh)


def add_backward(dx: Tensor | None, x: Tensor | None, dy: Tensor, delta: Delta, *, fresh: bool) -> Tensor | None:
    """Add dy ΔW in place, and find the gradient of the coefficients: see `beside_weight.add_backward`."""
    if dx is None and x is None:
        return None
    dy, (_, into, out) = rows_together(dy), delta.places.indices[:3]
    gradient = None
    if x is None:
        parts = components_of(dy, out, 2 * len(out))
    else:
        parts, gradient = _coefficients(rows_together(x.to(dy.dtype)), dy, delta)
    if dx is not None:
        _expand(dx, parts, _waves(into, delta), fresh=fresh)
    return gradient


def components_of(x: Tensor, factors: Tensor, ranks: int) -> Tensor:
    """X Dᵀ of a few tokens: [splits, T, ranks] float32, whose sum it is.

    Args:
        x: [T, n], rows contiguous.
        factors: [ranks, n] float32, contiguous; or [ranks / 2] int64, frequencies of cosines and of sines behind them.
    """
    from spectral_surgery.gpu.low_rank import POINTS, RANKS, STAGES, TOKENS, WARPS, components

    blocks, rows = -(-ranks // RANKS), -(-len(x) // TOKENS)
    splits = _splits(blocks * rows, x.shape[1])
    parts = x.new_empty((splits, len(x), ranks), dtype=torch.float32)
    with on(x):
        components[blocks, splits, rows](
            *(x, factors, parts, len(x), x.shape[1], x.stride(0), ranks),
            *(splits, TOKENS, RANKS, POINTS, factors.dtype == torch.int64),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return parts


def expanded(y: Tensor, parts: Tensor, factors: Tensor) -> None:
    """Write Z U in place of what y has: [T, n], contiguous.

    Args:
        parts: [splits, T, ranks] float32, whose sum is Z.
        factors: [ranks, n] float32, contiguous.
    """
    _expand(y, parts, (factors, parts, parts, parts, 1.0), fresh=True)


def _coefficients(x: Tensor, dy: Tensor, delta: Delta) -> tuple[Tensor, Tensor]:
    """What `components_of` gives of dy, and the gradient of the coefficients, [K] float32."""
    from spectral_surgery.gpu import low_rank as cut

    order, into, out = delta.places.indices[:3]
    ranks, tokens = 2 * len(order), len(x)
    blocks, rows = -(-ranks // cut.RANKS), -(-tokens // cut.TOKENS)
    splits = _splits(2 * blocks * rows, max(delta.shape))
    x_parts, y_parts = x.new_empty((2, splits, tokens, ranks), dtype=torch.float32)
    gradient = x.new_empty(len(order), dtype=torch.float32)
    with on(x):
        cut.both_components[blocks, 2 * splits, rows](
            *(x, into, x_parts, x.shape[1], x.stride(0), dy, out, y_parts, dy.shape[1], dy.stride(0)),
            *(tokens, ranks, splits, cut.TOKENS, cut.RANKS, cut.POINTS),
            num_warps=cut.WARPS,
            num_stages=cut.STAGES,
        )
        cut.coefficient_sums[(-(-len(order) // cut.SUMS),)](
            x_parts, y_parts, order, delta.places.factors[0], gradient, delta.scale, tokens, ranks, splits, cut.SUMS
        )
    return y_parts, gradient


def _waves(frequencies: Tensor, delta: Delta) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """What the kernel wants to know of waves."""
    return frequencies, delta.coefficients.contiguous(), delta.places.indices[0], delta.places.factors[0], delta.scale


def _expand(y: Tensor, parts: Tensor, factors: tuple[Tensor, Tensor, Tensor, Tensor, float], *, fresh: bool) -> None:
    from spectral_surgery.gpu.low_rank import INTO, OUT, OUT_STAGES, TOKENS, WARPS, expand

    (splits, tokens, ranks), length = parts.shape, y.shape[1]
    with on(y):
        expand[-(-length // OUT), -(-tokens // TOKENS)](
            *(y, parts, *factors, tokens, length, ranks),
            *(splits, TOKENS, INTO, OUT, factors[0].dtype == torch.int64, not fresh),
            num_warps=WARPS,
            num_stages=OUT_STAGES,
        )


def _splits(programs: int, length: int) -> int:
    """How many programs share the points of a length, so that they fill a GPU."""
    from spectral_surgery.gpu.low_rank import POINTS

    most = min(_PROGRAMS // programs, -(-length // POINTS))
    return 1 << max(most, 1).bit_length() - 1  # few of them are compiled


def on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_together(x: Tensor) -> Tensor:
    """A tensor [T, n] with contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()
