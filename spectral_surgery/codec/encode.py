"""A matrix to its stored form: transform, choose, quantise, code and verify, one frame at a time.

Every step works on one frame with one thread, hence the bytes do not depend on how many threads or processes share the
work. Choosing looks at a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import count
from operator import add

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec import hugepages
from spectral_surgery.codec.encoded import Basis, EncodedSpectrum, EncodingReport, frame_spans, rows_per_frame
from spectral_surgery.codec.frames import check, frame_of, narrowest
from spectral_surgery.codec.parallel import one_torch_thread, parallel_map
from spectral_surgery.codec.quantized import Moments, dequantize
from spectral_surgery.codec.quantizers import DEFAULT, QUANTIZERS, Rounding
from spectral_surgery.codec.quantizers.scalar import DeadZone, for_density
from spectral_surgery.codec.rate import Magnitudes, Target
from spectral_surgery.codec.sample import Sample
from spectral_surgery.errors import ConfigError, ShapeError

_ATTEMPTS = 8
_BITS_TOLERANCE = 0.004
_BEYOND = 2.0  # times the asked bits at most, and this part of them at least, are asked of a quantiser
_FLATTEST, _STEEPEST = 0.2, 5.0  # of the logarithm of the rate over that of the entropy
_SMALLEST, _LARGEST = 1e-30, 1e25  # float32 has no headroom for reciprocals of smaller numbers and sums of larger ones
_MAX_CODE = 1 << 30
_SUMMED = 1 << 15  # numbers: in float64, what is added up at once takes memory of its own
_ROUNDING = 1e-6  # of the matrix: more than the arithmetic of another processor, or of a resident form, differs by
_AIM = 0.998  # of an error limit, where the estimate missed it
_FINER = 0.9  # times the step, and this power more at each attempt, where the estimate keeps missing


def encode(
    weight: Tensor, target: Target, basis: Basis | None = None, *, quantizer: str | None = None, threads: int = 1
) -> tuple[EncodedSpectrum, EncodingReport]:
    """Compress a matrix, and measure the result by decoding it.

    Returns the encoded matrix and the measured report. A target in bits is met within half a percent where the matrix
    has that much to say and outweighs the fixed cost of about 40 bytes: from some 40,000 weights on. A density is met
    to the coefficient, but equal magnitudes are kept or dropped together, and less than a thousandth of a step is not
    kept. An error target is never exceeded by the decoded matrix, [O, I] float32.

    Args:
        weight: [O, I] of any floating type, finite, on the CPU.
        target: density, bits or error asked for.
        basis: transform, tile and axes; the default is DCT tiles of 64 along both axes.
        quantizer: name in QUANTIZERS for bits and errors; a density is always kept by `scalar`.
        threads: frames worked on at once; the result does not depend on it.

    Raises:
        ShapeError: when the weight is not a non-empty matrix.
        ConfigError: when it is not floating, not finite, has magnitudes above 1e25 or none above 1e-30.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ShapeError(f"encode: weight is {tuple(weight.shape)}; expected a non-empty [O, I] matrix.")
    if not weight.is_floating_point():
        raise ConfigError(f"encode: weight is {weight.dtype}; expected a floating type.")
    weight = weight.detach()
    basis = basis or Basis()
    height = rows_per_frame(weight.shape[1], basis.tile)
    spans = frame_spans(weight.shape[0], height)
    with one_torch_thread():
        frames = parallel_map(lambda span: _frame(weight[slice(*span)], basis), spans, threads)
        spectrum = _Spectrum(weight, frames, height, basis, threads, sum(frame.energy for frame in frames))
        found, report = _search(spectrum, target, quantizer)
        frames.clear()  # coefficients are most of the memory, and measuring needs none
        return (found.encoded, report) if report else _measured(spectrum, found)


@dataclass(frozen=True)
class _Frame:
    coefficients: Tensor  # [rows, I] float32
    peak: float  # the largest magnitude
    energy: float


def _frame(rows: Tensor, basis: Basis) -> _Frame:
    coefficients = hugepages.empty(rows.shape, torch.float32)
    peaks, energy = list[Tensor](), 0.0
    for start, stop in basis.blocks(rows.shape):
        block = coefficients[start:stop].copy_(rows[start:stop])
        block.copy_(basis.forward(block))
        peaks += torch.aminmax(block)
        energy += _energy(block)
    return _Frame(coefficients, float(torch.stack(peaks).abs().max()), energy)  # unlike max(), this one sees NaN


@dataclass(frozen=True)
class _Spectrum:
    weight: Tensor
    frames: list[_Frame]
    rows_per_frame: int
    basis: Basis
    threads: int
    energy: float


@dataclass(frozen=True)
class _Stored:
    encoded: EncodedSpectrum
    codes: list[Tensor]  # of every frame
    moments: Moments

    @property
    def bits_per_weight(self) -> float:
        rows, columns = self.encoded.shape
        return 8 * self.encoded.stored_bytes / (rows * columns)


def _search(spectrum: _Spectrum, target: Target, quantizer: str | None) -> tuple[_Stored, EncodingReport | None]:
    """What meets the target; its report where that had to be measured to know."""
    peaks = [frame.peak for frame in spectrum.frames]
    if not all(peak <= _LARGEST for peak in peaks):  # NaN compares false, and max() may skip it
        raise ConfigError(
            f"encode: weight has NaN or infinite values (or overflows float32, or exceeds {_LARGEST:g}); expected"
            " finite values of usual size."
        )
    peak = max(peaks)
    if 0 < peak < _SMALLEST:
        raise ConfigError(
            f"encode: all magnitudes are below {_SMALLEST:g}; expected larger ones. Rescale or exclude it."
        )
    if not peak:
        return _encode(spectrum, DeadZone(1.0, 1.0)), None
    sample = Sample([frame.coefficients for frame in spectrum.frames])
    if target.kind == "density":
        threshold = _exact_threshold(spectrum, sample.magnitudes, target.value)
        return _encode(spectrum, _storable(for_density(sample.magnitudes, threshold), peak)), None
    method = QUANTIZERS[quantizer or DEFAULT[target.kind]]
    if target.kind == "bits":
        return _search_bits(spectrum, lambda bits: _storable(method.for_bits(sample, bits), peak), target.value), None
    return _search_error(spectrum, lambda error: _storable(method.for_error(sample, error), peak), target.value)


def _search_error(
    spectrum: _Spectrum, for_error: Callable[[float], Rounding], limit: float
) -> tuple[_Stored, EncodingReport]:
    goal = limit - _ROUNDING
    rounding = for_error(goal)
    for attempt in count():
        stored = _encode(spectrum, rounding)
        report = _measured(spectrum, stored)[1]
        error = report.relative_error
        if error <= limit - _ROUNDING:
            break
        ratio = _AIM * (limit - _ROUNDING) / error
        if attempt < _ATTEMPTS // 2:
            goal *= ratio
            rounding = for_error(goal)
        else:  # few or large magnitudes, which the estimate finds too easy: a finer step helps in the end
            rounding = rounding.finer(min(ratio, _FINER ** (attempt - _ATTEMPTS // 2)))
    return stored, report


def _search_bits(spectrum: _Spectrum, for_bits: Callable[[float], Rounding], bits: float) -> _Stored:
    """The stored form of the nearest rate; what it misses is corrected by asking for more or less of the quantiser."""
    goal, results, tried = bits, list[_Stored](), list[tuple[float, float]]()
    for _ in range(_ATTEMPTS):
        results.append(_encode(spectrum, for_bits(goal)))
        ratio = results[-1].bits_per_weight / bits
        tried.append((goal, ratio))
        if abs(ratio - 1) <= _BITS_TOLERANCE or goal in (bits / _BEYOND, bits * _BEYOND):
            break
        results = [min(results, key=lambda stored: abs(stored.bits_per_weight / bits - 1))]  # no more in memory
        goal = min(max(goal * ratio ** (-1 / _slope(tried)), bits / _BEYOND), bits * _BEYOND)
    return min(results, key=lambda stored: abs(stored.bits_per_weight / bits - 1))


def _slope(tried: list[tuple[float, float]]) -> float:
    """Of the logarithm of the rate over that of the goal, from the last two goals; one where nothing is known."""
    if len(tried) < 2:
        return 1.0
    (before, first), (goal, last) = tried[-2:]
    if goal == before:
        return _STEEPEST
    return min(max(math.log(last / first) / math.log(goal / before), _FLATTEST), _STEEPEST)


def _storable(rounding: Rounding, peak: float) -> Rounding:
    """The quantiser, or the finest one whose codes fit 32 bits."""
    return rounding.finer(max(1.0, peak / _MAX_CODE / rounding.step))


def _encode(spectrum: _Spectrum, rounding: Rounding) -> _Stored:
    def stored(frame: _Frame) -> tuple[bytes, Tensor, Moments]:
        codes, sums = rounding.quantize(frame.coefficients)
        codes = codes.to(narrowest(codes))
        return frame_of(codes), codes, sums

    frames = parallel_map(stored, spectrum.frames, spectrum.threads)
    moments = reduce(add, (sums for _, _, sums in frames))
    step, offset = rounding.reconstruction(moments, max(int(codes.abs().max()) for _, codes, _ in frames))
    rows, columns = spectrum.weight.shape
    data = tuple(frame for frame, _, _ in frames)
    steps = torch.tensor([step])
    encoded = EncodedSpectrum(data, (rows, columns), spectrum.rows_per_frame, steps, offset, spectrum.basis)
    return _Stored(encoded, [codes for _, codes, _ in frames], moments)


def _measured(spectrum: _Spectrum, stored: _Stored) -> tuple[EncodedSpectrum, EncodingReport]:
    encoded, basis = stored.encoded, spectrum.basis

    wide = torch.float64 if spectrum.weight.dtype == torch.float64 else torch.float32

    def lost(frame: int) -> float:
        codes, first = stored.codes[frame], frame * encoded.rows_per_frame
        check(encoded.frames[frame], codes)
        energy = 0.0
        for start, stop in basis.blocks(codes.shape):
            rows = basis.inverse(dequantize(codes[start:stop], encoded.step, encoded.offset)).to(wide)
            energy += _energy(rows.sub_(spectrum.weight[first + start : first + stop].to(wide)))
        return energy

    report = EncodingReport(
        spectrum.weight.numel(),
        encoded.stored_bytes,
        int(stored.moments.kept),
        energy=spectrum.energy,
        error_energy=sum(parallel_map(lost, range(len(stored.codes)), spectrum.threads)),
        stored_energy=stored.moments.energy(float(encoded.step), encoded.offset),
    )
    return encoded, report


def _energy(x: Tensor) -> float:
    return sum(float(torch.linalg.vector_norm(some, dtype=torch.float64)) ** 2 for some in x.reshape(-1).split(_SUMMED))


def _exact_threshold(spectrum: _Spectrum, magnitudes: Magnitudes, density: float) -> float:
    frames = [frame.coefficients for frame in spectrum.frames]
    keep = max(1, round(density * sum(f.numel() for f in frames)))
    low = magnitudes.quantile(min(1.0, density + 0.01)) if density < 0.99 else 0.0
    high = magnitudes.quantile(max(0.0, density - 0.01)) if density > 0.01 else float("inf")
    for bracket in ((low, high), (0.0, float("inf"))):
        inside, above = [], 0
        for frame in frames:
            magnitude = frame.abs().reshape(-1).numpy()
            above += int(np.count_nonzero(magnitude >= bracket[1]))
            inside.append(magnitude[(magnitude >= bracket[0]) & (magnitude < bracket[1])])
        values = np.concatenate(inside)
        if above < keep <= above + values.size:
            break
    place = values.size - (keep - above)
    return float(np.partition(values, place)[place])
