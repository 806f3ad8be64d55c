"""A matrix to its stored form: transform, choose, quantise, code and verify, one frame at a time.

Every step works on one frame with one thread, hence the bytes do not depend on how many threads or processes share the
work. Choosing looks at a sample; a rate in bits, which depends on the entropy coder too, is tried on some frames first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import count
from operator import add

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, EncodedSpectrum, EncodingReport, frame_spans, rows_per_frame
from spectral_surgery.codec.frame_bytes import Layout, encode_frame
from spectral_surgery.codec.frames import checked_frame, choose_layouts, middle
from spectral_surgery.codec.parallel import one_torch_thread, parallel_map
from spectral_surgery.codec.quantized import Moments, code_dtype, dequantize, quantize, reconstruction
from spectral_surgery.codec.rate import Magnitudes, Quantizer, Target, for_bits, for_density, for_error
from spectral_surgery.errors import ConfigError, ShapeError

FloatArray = npt.NDArray[np.float32]

_SAMPLE = 1 << 17
_ATTEMPTS = 8
_PILOT = 8  # one of this many frames, neither of the least energy nor of the most, on which a rate is tried first
_BITS_TOLERANCE = 0.004
_BITS_NEAR = 0.05
_EXPECTED_OVERHEAD = 1.014
_FLATTEST, _STEEPEST = 0.2, 5.0  # of the logarithm of the rate over that of the entropy
_SMALLEST, _LARGEST = 1e-30, 1e25  # float32 has no headroom for reciprocals of smaller numbers and sums of larger ones
_MAX_CODE = 1 << 30
_ROUNDING = 1e-6  # of the matrix: more than the arithmetic of another processor, or of a resident form, differs by
_AIM = 0.998  # of an error limit, where the estimate missed it
_FINER = 0.9  # times the step, and this power more at each attempt, where the estimate keeps missing


def encode(
    weight: Tensor, target: Target, basis: Basis | None = None, *, threads: int = 1
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
        return _search(_Spectrum(weight, frames, height, basis, threads), target)


@dataclass(frozen=True)
class _Frame:
    coefficients: Tensor  # [rows, I] float32
    peak: float  # the largest magnitude
    energy: float


def _frame(rows: Tensor, basis: Basis) -> _Frame:
    coefficients = torch.empty(rows.shape)
    peaks, energy = [], 0.0
    for start, stop in basis.blocks(rows.shape):
        block = basis.forward(rows[start:stop])
        coefficients[start:stop] = block
        peaks.append(block.abs().max())
        energy += _energy(block)
    return _Frame(coefficients, float(torch.stack(peaks).max()), energy)  # unlike max(), this one sees NaN


@dataclass(frozen=True)
class _Spectrum:
    weight: Tensor
    frames: list[_Frame]
    rows_per_frame: int
    basis: Basis
    threads: int


@dataclass(frozen=True)
class _Stored:
    encoded: EncodedSpectrum
    codes: list[Tensor]  # of every frame
    moments: Moments

    @property
    def bits_per_weight(self) -> float:
        rows, columns = self.encoded.shape
        return 8 * self.encoded.stored_bytes / (rows * columns)


def _search(spectrum: _Spectrum, target: Target) -> tuple[EncodedSpectrum, EncodingReport]:
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
        return _measured(spectrum, _encode(spectrum, Quantizer(1.0, 1.0), peak))
    magnitudes = Magnitudes(_sample(spectrum.frames))
    if target.kind == "density":
        threshold = _exact_threshold(spectrum, magnitudes, target.value)
        return _measured(spectrum, _encode(spectrum, for_density(magnitudes, threshold), peak))
    if target.kind == "bits":
        return _measured(spectrum, _search_bits(spectrum, magnitudes, target.value, peak))
    return _search_error(spectrum, magnitudes, target.value, peak)


def _search_error(
    spectrum: _Spectrum, magnitudes: Magnitudes, limit: float, peak: float
) -> tuple[EncodedSpectrum, EncodingReport]:
    goal = limit - _ROUNDING
    quantizer = for_error(magnitudes, goal)
    for attempt in count():
        result = _measured(spectrum, _encode(spectrum, quantizer, peak))
        error = result[1].relative_error
        if error <= limit - _ROUNDING:
            break
        ratio = _AIM * (limit - _ROUNDING) / error
        if attempt < _ATTEMPTS // 2:
            goal *= ratio
            quantizer = for_error(magnitudes, goal)
        else:  # few or large magnitudes, which the estimate finds too easy: a finer step helps in the end
            ratio = min(ratio, _FINER ** (attempt - _ATTEMPTS // 2))
            quantizer = Quantizer(quantizer.dead_zone * ratio, quantizer.step * ratio)
    return result


@dataclass(frozen=True)
class _Setting:
    goal: float  # entropy asked of the quantiser, in bits
    quantizer: Quantizer
    layouts: list[Layout]  # of every frame


def _search_bits(spectrum: _Spectrum, magnitudes: Magnitudes, bits: float, peak: float) -> _Stored:
    frames, results = spectrum.frames, []

    def for_goal(goal: float, like: _Setting | None) -> _Setting:
        if like:
            return _Setting(goal, _storable(for_bits(magnitudes, goal, like.quantizer), peak), like.layouts)
        quantizer = _storable(for_bits(magnitudes, goal), peak)
        return _Setting(goal, quantizer, _layouts(spectrum, quantizer, peak))

    def on_some(setting: _Setting) -> float:
        layouts = [setting.layouts[number] for number in pilot]
        return _pilot_bits([frames[number] for number in pilot], layouts, setting.quantizer, peak) / bits

    def on_all(setting: _Setting) -> float:
        results.append(_encode(spectrum, setting.quantizer, peak, setting.layouts))
        return results[-1].bits_per_weight / bits

    setting = for_goal(bits / _EXPECTED_OVERHEAD, None)
    if len(frames) > 2:
        by_energy = sorted(range(len(frames)), key=lambda number: frames[number].energy)
        pilot = by_energy[min(_PILOT, len(frames)) // 2 :: _PILOT]
        setting = _closest(setting, on_some, for_goal)
    _closest(setting, on_all, for_goal)
    return min(results, key=lambda stored: abs(stored.bits_per_weight / bits - 1))


def _closest(
    setting: _Setting, rate: Callable[[_Setting], float], for_goal: Callable[[float, _Setting | None], _Setting]
) -> _Setting:
    """Correct the goal until the rate is the asked one.

    With layouts chosen anew the rate jumps where others become the smallest; with the same ones it does not. So the
    goal is corrected with new ones until it is near, or caught between two, and then with the same ones. Returns the
    setting with the nearest rate.

    Args:
        setting: to begin with.
        rate: what a setting gives, as a multiple of what was asked.
        for_goal: the setting for a goal: with the layouts and the dead zone of another, or with the best.
    """
    tried: list[tuple[_Setting, float]] = []
    held: _Setting | None = None  # whose layouts are kept
    for attempt in range(_ATTEMPTS):
        tried.append((setting, rate(setting)))
        ratio = tried[-1][1]
        if abs(ratio - 1) <= _BITS_TOLERANCE:
            break
        around = _around(tried)
        if not held and abs(ratio - 1) < _BITS_NEAR:
            held = setting
        elif not held and around and attempt < _ATTEMPTS // 2:
            (low, below), (high, above) = ((trial.goal, found) for trial, found in around)
            setting = for_goal(low * (high / low) ** (math.log(1 / below) / math.log(above / below)), None)
            continue
        elif not held and around:
            held = around[0][0]  # its layouts are the better ones at a jump: fewer bits at about the same goal
        same = [(trial.goal, found) for trial, found in tried if not held or trial.layouts is held.layouts]
        goal, ratio = min(same, key=lambda pair: abs(pair[1] - 1))
        setting = for_goal(goal * ratio ** (-1 / _slope(same)), held)
    return min(tried, key=lambda pair: abs(pair[1] - 1))[0]


def _around(tried: list[tuple[_Setting, float]]) -> tuple[tuple[_Setting, float], tuple[_Setting, float]] | None:
    """The settings nearest below and above the asked rate; None where all are on one side."""
    below, above = ([pair for pair in tried if (pair[1] > 1) == side] for side in (False, True))
    if not below or not above:
        return None
    return max(below, key=lambda pair: pair[1]), min(above, key=lambda pair: pair[1])


def _slope(tried: list[tuple[float, float]]) -> float:
    """Of the logarithm of the rate over that of the goal, from the last two goals; one where nothing is known."""
    if len(tried) < 2:
        return 1.0
    (before, first), (goal, last) = tried[-2:]
    if goal == before:
        return _STEEPEST
    return min(max(math.log(last / first) / math.log(goal / before), _FLATTEST), _STEEPEST)


def _pilot_bits(frames: list[_Frame], layouts: list[Layout], quantizer: Quantizer, peak: float) -> float:
    dtype = code_dtype(peak, quantizer)
    size = 0
    for frame, layout in zip(frames, layouts, strict=True):
        codes, _ = quantize(frame.coefficients, quantizer, dtype)
        size += len(encode_frame(codes.reshape(-1).numpy(), layout))
    return 8 * size / sum(frame.coefficients.numel() for frame in frames)


def _storable(quantizer: Quantizer, peak: float) -> Quantizer:
    """The quantiser, or the finest one whose codes fit 32 bits."""
    step = max(quantizer.step, peak / _MAX_CODE)
    return quantizer if step == quantizer.step else Quantizer(max(quantizer.dead_zone, step / 2), step)


def _layouts(spectrum: _Spectrum, quantizer: Quantizer, peak: float) -> list[Layout]:
    dtype, frames = code_dtype(peak, quantizer), spectrum.frames

    def codes(number: int) -> Tensor:
        return quantize(middle(frames[number].coefficients, spectrum.basis.tile), quantizer, dtype)[0]

    return choose_layouts([frame.energy / frame.coefficients.numel() for frame in frames], codes)


def _encode(spectrum: _Spectrum, quantizer: Quantizer, peak: float, layouts: list[Layout] | None = None) -> _Stored:
    quantizer = _storable(quantizer, peak)
    dtype = code_dtype(peak, quantizer)

    def stored(pair: tuple[_Frame, Layout]) -> tuple[bytes, Tensor, Moments]:
        codes, sums = quantize(pair[0].coefficients, quantizer, dtype)
        return checked_frame(codes, pair[1]), codes, sums

    pairs = list(zip(spectrum.frames, layouts or _layouts(spectrum, quantizer, peak), strict=True))
    made = parallel_map(stored, pairs, spectrum.threads)
    moments = reduce(add, (sums for _, _, sums in made))
    step, offset = reconstruction(moments, max(int(codes.abs().max()) for _, codes, _ in made))
    rows, columns = spectrum.weight.shape
    frames = tuple(data for data, _, _ in made)
    steps = torch.tensor([step])
    encoded = EncodedSpectrum(frames, (rows, columns), spectrum.rows_per_frame, steps, offset, spectrum.basis)
    return _Stored(encoded, [codes for _, codes, _ in made], moments)


def _measured(spectrum: _Spectrum, stored: _Stored) -> tuple[EncodedSpectrum, EncodingReport]:
    encoded, basis = stored.encoded, spectrum.basis

    wide = torch.float64 if spectrum.weight.dtype == torch.float64 else torch.float32

    def lost(frame: int) -> float:
        codes, first = stored.codes[frame], frame * encoded.rows_per_frame
        energy = 0.0
        for start, stop in basis.blocks(codes.shape):
            rows = spectrum.weight[first + start : first + stop].to(wide)
            energy += _energy(rows - basis.inverse(dequantize(codes[start:stop], encoded.step, encoded.offset)))
        return energy

    report = EncodingReport(
        spectrum.weight.numel(),
        encoded.stored_bytes,
        int(stored.moments.kept),
        energy=sum(frame.energy for frame in spectrum.frames),
        error_energy=sum(parallel_map(lost, range(len(stored.codes)), spectrum.threads)),
        stored_energy=stored.moments.energy(float(encoded.step), encoded.offset),
    )
    return encoded, report


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _sample(frames: list[_Frame]) -> FloatArray:
    flat = [frame.coefficients.reshape(-1) for frame in frames]
    stride = max(1, sum(map(len, flat)) // _SAMPLE) | 1  # odd: does not resonate with tiles
    return np.concatenate([frame[::stride].numpy() for frame in flat])


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
