"""ΔW itself, and the gradient of the coefficients from one of a weight: cheaper once tokens are many.

With half the columns of the spectrum, ΔW is an inverse real FFT along rows of one along the columns that have
coefficients, which are real. ΔW[-o, -i] = ΔW[o, i], so half of the rows are mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_surgery.fourier.gather_scatter import scatter
from spectral_surgery.fourier.rfft_positions import Delta, share, unfolded_rows

_BLOCK = 128  # rows of ΔW at a time


def merged_weight(weight: Tensor | None, delta: Delta) -> Tensor:
    """W + ΔW: [O, I] in the dtype of the weight, else of the coefficients.

    ``weight``: [O, I], any float dtype; None for ΔW alone.
    """
    (rows, columns), coefficients = delta.shape, delta.coefficients
    like = coefficients if weight is None else weight
    out = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
    half = rows // 2 + 1
    for start, block in _top_rows(delta):
        stop = start + len(block)
        _put(out[start:stop], None if weight is None else weight[start:stop], block)
        first, last = max(start, 1), min(stop, rows - half + 1)  # rows o with a mirror image at O - o
        if first < last:
            image = slice(rows - last + 1, rows - first + 1)
            mirrored = block[first - start : last - start].flip(0, 1)  # column i is at I - 1 - i, and belongs at I - i
            _put(out[image, 1:], None if weight is None else weight[image, 1:], mirrored[:, :-1])
            _put(out[image, 0], None if weight is None else weight[image, 0], mirrored[:, -1])
    return out


def delta_rows(ids: Tensor, delta: Delta) -> Tensor:
    """Rows of ΔW, differentiable in the coefficients: [N, I] in the dtype of the coefficients.

    ``ids``: [N] int64, in 0 .. O-1.
    """
    (rows, columns), coefficients = delta.shape, delta.coefficients
    order, column, _ = delta.places.indices[:3].unbind()
    turns = torch.outer(ids, unfolded_rows(delta.places, rows)) % rows  # [N, K]
    angles = turns.to(coefficients.dtype) * (2 * math.pi / rows)
    values = coefficients[order] * share(column, columns).to(coefficients.dtype) * delta.scale
    bins = scatter(torch.complex(angles.cos() * values, -angles.sin() * values), column, columns // 2 + 1)
    picked: Tensor = torch.fft.irfft(bins, n=columns, norm="forward")
    return picked


def coefficients_of(weight: Tensor, delta: Delta) -> Tensor:
    """The gradient of the coefficients, given that of ΔW: [K] float32, or float64 for a float64 weight.

    Args:
        weight: [O, I], any float dtype.
        delta: the update; its coefficients give the number only.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    order, columns = delta.places.indices[:2].unbind()
    used, column = torch.unique(columns, return_inverse=True)
    blocks = [torch.fft.rfft(block.to(wide))[:, used] for block in torch.split(weight, 512)]
    spectrum = torch.fft.ifft(torch.cat(blocks).t(), norm="forward")  # [U, O]
    values = spectrum[column, unfolded_rows(delta.places, delta.shape[0])].real * delta.scale
    return torch.empty_like(values).index_copy_(0, order, values)


def _top_rows(delta: Delta) -> Iterator[tuple[int, Tensor]]:
    # rows 0 .. O // 2 of ΔW in blocks, each with the number of its first row
    (rows, columns), half = delta.shape, delta.shape[0] // 2 + 1
    wide = torch.float64 if delta.coefficients.dtype == torch.float64 else torch.float32
    order, column, _ = delta.places.indices[:3].unbind()
    values = delta.coefficients.take(order).to(wide) * share(column, columns) * delta.scale
    used, place = torch.unique(column, return_inverse=True)
    sparse = values.new_zeros(len(used), rows)
    sparse.view(-1).index_add_(0, place * rows + unfolded_rows(delta.places, rows), values)
    spectrum = torch.fft.rfft(sparse)  # [U, O // 2 + 1]
    for start in range(0, half, _BLOCK):
        stop = min(start + _BLOCK, half)
        bins = spectrum.new_zeros(stop - start, columns // 2 + 1)
        bins[:, used] = spectrum[:, start:stop].t()
        yield start, torch.fft.irfft(bins, n=columns, norm="forward")


def _put(out: Tensor, weight: Tensor | None, values: Tensor) -> None:
    if weight is None:
        out.copy_(values)
    else:
        torch.add(weight, values, out=out)
