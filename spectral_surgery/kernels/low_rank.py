"""A low-rank update between transforms for one row of activations, in one call; see `adapters.low_rank`.

The factors are read once, and rows are transformed by the FFT of `fourier`. Real transforms come from half of the
spectrum of n points: bin k of an FFT gives coefficients k and n - k. The DCT takes points in the order of Makhoul, A
fast cosine transform in one and two dimensions, 1980.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels.compile import kernel
from spectral_surgery.kernels.fourier import from_half, half_of

Array = npt.NDArray[Any]
DCT, HARTLEY, DFT = range(3)
KINDS = {"dct": DCT, "hartley": HARTLEY, "dft": DFT}  # by name in `adapters.low_rank.BASES`
_CHAINS = 8  # sums at once, since one would wait for itself


@kernel
def update(x: Array, a: Array, b: Array, mask: Array, scale: float, kind: int, into: Any, back: Any, y: Array) -> None:
    """Write ``scale * T_outᵀ B diag(mask) A T_in x``.

    Args:
        x: [I] float32.
        a: [r, C] float32, C-contiguous; for DFT real and imaginary parts in turn, [r, 2 C].
        b: [C', r] the same; for DFT [C', 2 r].
        mask: [r] int8 of ones and zeros; [0] for ones.
        kind: DCT, HARTLEY or DFT.
        into: of I: cosines, sines, radices as in `fourier.add_row`, and turns [2, I // 2 + 1] float32, the cosines and
            sines of a quarter of an angle of the bin.
        back: of O, the same, with positive sines.
        y: [O] float32, written.
    """
    numbers = _coefficients(x, kind, into)
    low = np.empty((2, len(a)), np.float32)  # real and imaginary parts
    for component in range(len(a)):
        factor = np.float32(scale if mask.size == 0 or mask[component] > 0 else 0)
        re, im = _product(a[component], numbers, kind == DFT)
        low[0, component], low[1, component] = factor * re, factor * im
    out = np.empty(len(b) * (2 if kind == DFT else 1), np.float32)
    for number in range(len(b)):
        re, im = np.float32(0), np.float32(0)
        for component in range(len(a)):
            if kind == DFT:
                b_re, b_im = b[number, 2 * component], b[number, 2 * component + 1]
                re += b_re * low[0, component] - b_im * low[1, component]
                im += b_re * low[1, component] + b_im * low[0, component]
            else:
                re += b[number, component] * low[0, component]
        if kind == DFT:
            out[2 * number], out[2 * number + 1] = re, im
        else:
            out[number] = re
    _points(out, kind, back, y)


@kernel
def _product(row: Array, numbers: Array, complex_: bool) -> tuple[np.float32, np.float32]:
    """Sum of products, of complex numbers as pairs of real ones."""
    sums = np.zeros((2, _CHAINS), np.float32)
    whole = row.size // _CHAINS * _CHAINS
    for first in range(0, whole, _CHAINS):
        for place in range(_CHAINS):
            sums[0, place] += row[first + place] * numbers[first + place]
            if complex_:
                sums[1, place] += row[first + place] * numbers[first + place ^ 1]
    for place in range(whole, row.size):
        sums[0, place - whole] += row[place] * numbers[place]
        if complex_:
            sums[1, place - whole] += row[place] * numbers[place ^ 1]
    if not complex_:
        return sums[0].sum(), np.float32(0)
    return sums[0, ::2].sum() - sums[0, 1::2].sum(), sums[1].sum()


@kernel
def _coefficients(points: Array, kind: int, plan: Any) -> Array:
    """T x of real points [n]: [n], or for DFT real and imaginary parts of its bins in turn."""
    cosines, sines, radices, turns = plan
    n = points.size
    if kind == DCT:
        turned = np.empty(n, np.float32)
        half = (n + 1) // 2
        turned[:half] = points[::2]
        turned[half:] = points[1::2][::-1]
        points = turned
    re, im = half_of(points, cosines, sines, radices)
    factor = np.float32(1 / np.sqrt(n))
    out = np.empty(2 * re.size if kind == DFT else n, np.float32)
    for bin in range(re.size):
        a, b = re[bin] * factor, im[bin] * factor
        if kind == DFT:
            out[2 * bin], out[2 * bin + 1] = a, b
        elif kind == HARTLEY:
            out[bin] = a - b
            if bin:
                out[n - bin] = a + b
        else:
            c, s = turns[0, bin], turns[1, bin]
            out[bin] = a * c + b * s
            if bin:
                out[n - bin] = a * s - b * c
    return out


@kernel
def _points(numbers: Array, kind: int, plan: Any, y: Array) -> None:
    """Tᵀ of coefficients, to y [n]."""
    cosines, sines, radices, turns = plan
    n = y.size
    re, im = np.empty(n // 2 + 1, np.float32), np.empty(n // 2 + 1, np.float32)
    factor = np.float32(1 / np.sqrt(n))
    for bin in range(re.size):
        one, other = numbers[bin], numbers[(n - bin) % n]
        if kind == DFT:
            re[bin], im[bin] = numbers[2 * bin], numbers[2 * bin + 1]
        elif kind == HARTLEY:
            re[bin], im[bin] = (one + other) / 2, (other - one) / 2
        elif bin:
            c, s = turns[0, bin] / 2, turns[1, bin] / 2
            re[bin], im[bin] = one * c + other * s, one * s - other * c
        else:
            re[0] = one
        re[bin] *= factor
        im[bin] *= factor
    y[:] = 0
    if kind != DCT:
        from_half(re, im, cosines, sines, radices, y)
        return
    points = np.zeros(n, np.float32)
    from_half(re, im, cosines, sines, radices, points)
    half = (n + 1) // 2
    y[::2] = points[:half]
    y[1::2] = points[half:][::-1]
