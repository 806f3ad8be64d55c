"""A low-rank update between transforms for one row of activations, in one call; see `adapters.low_rank`.

The factors are read once, and rows are transformed by the FFT of `fourier`. Real transforms come from half of the
spectrum of n points: bin k of an FFT gives coefficients k and n - k. The DCT takes points in the order of Makhoul, A
fast cosine transform in one and two dimensions, 1980.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels.compile import inlined, kernel
from spectral_surgery.kernels.fourier import from_half, half_of

Array = npt.NDArray[Any]
DCT, HARTLEY = range(2)
KINDS = {"dct": DCT, "hartley": HARTLEY}  # by name in `adapters.low_rank.BASES`


@kernel
def update(x: Array, a: Array, b: Array, mask: Array, scale: float, kind: int, into: Any, back: Any, y: Array) -> None:
    """Write ``scale * T_outᵀ B diag(mask) A T_in x``.

    Args:
        x: [I] float32.
        a: [r, I] float32, C-contiguous.
        b: [O, r], the same.
        mask: [r] int8 of ones and zeros; [0] for ones.
        kind: DCT or HARTLEY.
        into: of I: cosines, sines, radices as in `fourier.add_row`, and turns [2, I // 2 + 1] float32, the cosines and
            sines of a quarter of an angle of the bin.
        back: of O, the same, with positive sines.
        y: [O] float32, written.
    """
    numbers, low = _coefficients(x, kind, into), np.empty(len(a), np.float32)
    for component in range(len(a)):
        factor = np.float32(scale if mask.size == 0 or mask[component] > 0 else 0)
        low[component] = factor * _sum_of_products(a[component], numbers)
    out = np.empty(len(b), np.float32)
    for number in range(len(b)):
        out[number] = _sum_of_products(b[number], low)
    _points(out, kind, back, y)


@inlined
def _sum_of_products(one: Array, other: Array) -> np.float32:
    """In eight sums, since one would wait for itself."""
    a = b = c = d = e = f = g = h = np.float32(0)
    whole = one.size // 8 * 8
    for first in range(0, whole, 8):
        x, y = one[first : first + 8], other[first : first + 8]
        a, b, c, d = a + x[0] * y[0], b + x[1] * y[1], c + x[2] * y[2], d + x[3] * y[3]
        e, f, g, h = e + x[4] * y[4], f + x[5] * y[5], g + x[6] * y[6], h + x[7] * y[7]
    for place in range(whole, one.size):
        a += one[place] * other[place]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@kernel
def _coefficients(points: Array, kind: int, plan: Any) -> Array:
    """T x of points [n]: [n]."""
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
    out = np.empty(n, np.float32)
    for bin in range(re.size):
        a, b = re[bin] * factor, im[bin] * factor
        if kind == HARTLEY:
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
        if kind == HARTLEY:
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
