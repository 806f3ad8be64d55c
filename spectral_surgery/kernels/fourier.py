"""The residual of a sparse Fourier spectrum for one row of activations, in one call.

Between two layers of a language model that writes, their weights have pushed everything else out of the caches, and
what counts is how much is called and read: here it is this function, two tables of roots and the coefficients.
Source: the self-sorting FFT of Stockham, with radices 4, 2 and any prime.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_surgery.kernels.compile import inlined, kernel

Array = npt.NDArray[Any]


@kernel
def add_row(
    x: Array, coefficients: Array, indices: Array, factors: Array, scale: float, roots: Array, radices: Array, y: Array
) -> None:
    """Y + x ΔWᵀ of one row, in place; see `fourier.one_row.add_row`.

    Args:
        x: [I] floating.
        coefficients: [K] floating.
        indices: [3, K] int64, of x -> y as in `fourier.rfft_positions.Places`.
        factors: [K, 2] float32, the same.
        scale: of the sums over coefficients.
        roots: [2 (I + O)] float32: powers of the roots of unity of order I and O, each as cosines and sines, with
            negative sines for I.
        radices: int64: how many are of I, and those of I and of O: of half of an even length.
        y: [O] float32, changed.
    """
    columns, rows, middle = len(x), len(y), 2 * len(x)
    cosines, sines = roots[:columns], roots[columns:middle]
    re, im = _spectrum(x, cosines, sines, radices[1 : 1 + radices[0]])
    to_re, to_im = np.zeros(rows // 2 + 1, np.float32), np.zeros(rows // 2 + 1, np.float32)
    for number in range(indices.shape[1]):
        source, target = indices[1, number], indices[2, number]
        value = np.float32(coefficients[indices[0, number]]) * np.float32(scale)
        a, b = _bin(re, im, cosines, sines, source)
        to_re[target] += a * factors[number, 0] * value
        to_im[target] += b * factors[number, 1] * value
    from_half(to_re, to_im, roots[middle : middle + rows], roots[middle + rows :], radices[1 + radices[0] :], y)


@inlined
def _bin(re: Array, im: Array, cosines: Array, sines: Array, number: int) -> tuple[np.float32, np.float32]:
    """A bin of x from what `_spectrum` gave: for an even length, of numbers at even places + i times those at odd ones.

    Its roots are of the length of x.
    """
    if cosines.size % 2:
        return re[number], im[number]
    one, other = number % re.size, (re.size - number) % re.size
    c, s = cosines[number], sines[number]
    odd_re, odd_im = im[one] + im[other], re[other] - re[one]
    a = (re[one] + re[other] + odd_re * c - odd_im * s) * np.float32(0.5)
    b = (im[one] - im[other] + odd_re * s + odd_im * c) * np.float32(0.5)
    return a, b


@kernel
def half_of(x: Array, cosines: Array, sines: Array, radices: Array) -> tuple[Array, Array]:
    """Half of the spectrum of real x [n]: [n // 2 + 1] real and imaginary parts; arguments as of `add_row`."""
    re, im = _spectrum(x, cosines, sines, radices)
    to_re, to_im = np.empty(x.size // 2 + 1, np.float32), np.empty(x.size // 2 + 1, np.float32)
    for number in range(to_re.size):
        to_re[number], to_im[number] = _bin(re, im, cosines, sines, number)
    return to_re, to_im


@kernel
def _spectrum(x: Array, cosines: Array, sines: Array, radices: Array) -> tuple[Array, Array]:
    """Of x; of an even length, of pairs of numbers as one complex number each."""
    if len(x) % 2:
        re, im = np.empty(len(x), np.float32), np.zeros(len(x), np.float32)
        re[:] = x
        return transform(re, im, cosines, sines, radices)
    re, im = np.empty(len(x) // 2, np.float32), np.empty(len(x) // 2, np.float32)
    re[:] = x[::2]
    im[:] = x[1::2]
    return transform(re, im, cosines, sines, radices)


@kernel
def from_half(re: Array, im: Array, cosines: Array, sines: Array, radices: Array, y: Array) -> None:
    """Add real numbers of which this is half of the spectrum, [O // 2 + 1], to y; sums, with no factor."""
    rows, half = len(y), len(y) // 2
    im[0] = 0
    if rows % 2:
        whole, zero = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        whole[0] = re[0]
        whole[1 : half + 1] = np.float32(2) * re[1:]
        zero[1 : half + 1] = np.float32(2) * im[1:]
        whole, zero = transform(whole, zero, cosines, sines, radices)
        y += whole
        return
    im[half] = 0
    even, odd = np.empty(half, np.float32), np.empty(half, np.float32)
    for bin in range(half):
        far_re, far_im = re[half - bin], -im[half - bin]
        a, b = re[bin] - far_re, im[bin] - far_im
        c, s = cosines[bin], sines[bin]
        even[bin] = re[bin] + far_re - a * s - b * c
        odd[bin] = im[bin] + far_im + a * c - b * s
    even, odd = transform(even, odd, cosines, sines, radices)
    y[::2] += even
    y[1::2] += odd


@kernel
def transform(re: Array, im: Array, cosines: Array, sines: Array, radices: Array) -> tuple[Array, Array]:
    """Discrete Fourier transform of any length n: [n] real and imaginary parts, in new arrays or in these.

    Args:
        re: [n] float32, overwritten.
        im: [n] float32, overwritten.
        cosines: [n] or [2 n] float32, of the powers of the root of unity of this order.
        sines: the same; their sign is that of the transform.
        radices: [f] int64, 4 or primes, whose product is n.
    """
    to_re, to_im = np.empty_like(re), np.empty_like(im)
    if not len(re):
        return re, im
    stride, rest, step = 1, len(re), len(cosines) // len(re)
    for radix in radices:
        rest //= radix
        if radix == 4:
            _fours(re, im, to_re, to_im, cosines, sines, rest, stride, step)
        elif radix == 2:
            _pairs(re, im, to_re, to_im, cosines, sines, rest, stride, step)
        else:
            _primes(re, im, to_re, to_im, cosines, sines, rest, stride, step, radix)
        re, im, to_re, to_im = to_re, to_im, re, im
        stride *= radix
    return re, im


@kernel
def _fours(
    re: Array, im: Array, to_re: Array, to_im: Array, cosines: Array, sines: Array, rest: int, stride: int, step: int
) -> None:
    sign = sines[len(sines) // 4]
    far = rest * stride
    for group in range(rest):
        first, turn = group * stride, group * stride * step
        c1, s1 = cosines[turn], sines[turn]
        c2, s2 = cosines[2 * turn], sines[2 * turn]
        c3, s3 = cosines[3 * turn], sines[3 * turn]
        for inner in range(stride):
            at, to = first + inner, 4 * first + inner
            sum_re, sum_im = re[at] + re[at + 2 * far], im[at] + im[at + 2 * far]
            dif_re, dif_im = re[at] - re[at + 2 * far], im[at] - im[at + 2 * far]
            odd_re, odd_im = re[at + far] + re[at + 3 * far], im[at + far] + im[at + 3 * far]
            up_re = sign * (im[at + 3 * far] - im[at + far])
            up_im = sign * (re[at + far] - re[at + 3 * far])
            to_re[to], to_im[to] = sum_re + odd_re, sum_im + odd_im
            a, b = dif_re + up_re, dif_im + up_im
            to_re[to + stride], to_im[to + stride] = a * c1 - b * s1, a * s1 + b * c1
            a, b = sum_re - odd_re, sum_im - odd_im
            to_re[to + 2 * stride], to_im[to + 2 * stride] = a * c2 - b * s2, a * s2 + b * c2
            a, b = dif_re - up_re, dif_im - up_im
            to_re[to + 3 * stride], to_im[to + 3 * stride] = a * c3 - b * s3, a * s3 + b * c3


@kernel
def _pairs(
    re: Array, im: Array, to_re: Array, to_im: Array, cosines: Array, sines: Array, rest: int, stride: int, step: int
) -> None:
    far = rest * stride
    for group in range(rest):
        first, turn = group * stride, group * stride * step
        c, s = cosines[turn], sines[turn]
        for inner in range(stride):
            at, to = first + inner, 2 * first + inner
            a, b = re[at] - re[at + far], im[at] - im[at + far]
            to_re[to], to_im[to] = re[at] + re[at + far], im[at] + im[at + far]
            to_re[to + stride], to_im[to + stride] = a * c - b * s, a * s + b * c


@kernel
def _primes(
    re: Array,
    im: Array,
    to_re: Array,
    to_im: Array,
    cosines: Array,
    sines: Array,
    rest: int,
    stride: int,
    step: int,
    radix: int,
) -> None:
    far, count = rest * stride, len(re)
    for group in range(rest):
        at, to = group * stride, radix * group * stride
        for part in range(radix):
            out_re, out_im = to_re[to + part * stride :][:stride], to_im[to + part * stride :][:stride]
            out_re[:] = 0
            out_im[:] = 0
            for term in range(radix):
                turn = (part * group * stride + term * part % radix * (count // radix)) % count
                c, s = cosines[step * turn], sines[step * turn]
                in_re, in_im = re[at + term * far :][:stride], im[at + term * far :][:stride]
                for inner in range(stride):
                    out_re[inner] += in_re[inner] * c - in_im[inner] * s
                    out_im[inner] += in_re[inner] * s + in_im[inner] * c
