"""A matrix to its stored form: transform, choose, quantise, code and verify, one frame at a time.

Every step works on one frame with one thread, hence the bytes do not depend on how many threads or processes share the
work. Choosing looks at a sample; a rate in bits, which depends on the entropy coder too, is tried on some frames first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError, ConfigError, ShapeError
from spectral_surgery.spectra.codec import Basis, EncodedSpectrum, EncodingReport, frame_spans, rows_per_frame
from spectral_surgery.spectra.coding import Layout, choose_layout, decode_frame, encode_frame
from spectral_surgery.spectra.parallel import one_torch_thread, parallel_map
from spectral_surgery.spectra.quantized import Moments, code_dtype, dequantize, quantize, reconstruction
from spectral_surgery.spectra.select import Magnitudes, Quantizer, Target, for_bits, for_density, for_error

FloatArray = npt.NDArray[np.float32]

_SAMPLE = 1 << 17
_ATTEMPTS = 6
_TRIED = 1 << 16  # coefficients that layouts are tried on, in whole tiles
_SAME_SCALE = 0.5  # of log2 of the mean square
_PILOT = 8  # one of so many frames, neither of the least energy nor of the most, on which a rate is tried first
_BITS_TOLERANCE = 0.004
_BITS_NEAR = 0.05
_EXPECTED_OVERHEAD = 1.014
_SMALLEST, _LARGEST = 1e-30, 1e25  # float32 has no headroom for reciprocals of smaller numbers and sums of larger ones
_MAX_CODE = 1 << 30


def encode(
    weight: Tensor, target: Target, basis: Basis | None = None, *, threads: int = 1
) -> tuple[EncodedSpectrum, EncodingReport]:
    """Compress a matrix, and measure the result by decoding it.

    Args:
        weight: [O, I] of any floating type, finite, on the CPU.
        target: density, bits or error asked for.
        basis: transform, tile and axes; the default is DCT tiles of 64 along both axes.
        threads: frames worked on at once; the result does not depend on it.

    Returns:
        The encoded matrix and the measured report. A target in bits is met within half a percent where the matrix has
        that much to say and outweighs the fixed cost of about 40 bytes; an error target is never exceeded.

    Raises:
        ShapeError: when the weight is not a non-empty matrix.
        ConfigError: when it is not floating, not finite, has magnitudes above 1e25 or none above 1e-30.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ShapeError(f"encode: weight is {tuple(weight.shape)}; a non-empty [O, I] matrix is accepted.")
    if not weight.is_floating_point():
        raise ConfigError(f"encode: weight is {weight.dtype}; a floating type is accepted.")
    weight = weight.detach()
    basis = basis or Basis()
    height = rows_per_frame(weight.shape[1], basis.tile)
    spans = frame_spans(weight.shape[0], height)
    with one_torch_thread():
        frames = parallel_map(lambda span: _frame(weight[slice(*span)], basis), spans, threads)
        return _search(_Spectrum(frames, height, basis, threads), target)


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
    frames: list[_Frame]
    rows_per_frame: int
    basis: Basis
    threads: int

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(own.coefficients) for own in self.frames), self.frames[0].coefficients.shape[1]


def _search(spectrum: _Spectrum, target: Target) -> tuple[EncodedSpectrum, EncodingReport]:
    peaks = [own.peak for own in spectrum.frames]
    if not all(peak <= _LARGEST for peak in peaks):  # NaN compares false, and max() may skip it
        raise ConfigError(
            f"encode: weight has NaN or infinite values (or overflows float32, or exceeds {_LARGEST:g}); "
            "finite values of usual size are accepted."
        )
    peak = max(peaks)
    if 0 < peak < _SMALLEST:
        raise ConfigError(
            f"encode: all magnitudes are below {_SMALLEST:g}; larger ones are accepted. Rescale or exclude it."
        )
    if not peak:
        return _encode(spectrum, Quantizer(1.0, 1.0), peak)
    magnitudes = Magnitudes(_sample(spectrum.frames))
    if target.kind == "density":
        threshold = _exact_threshold(spectrum, magnitudes, target.value)
        return _encode(spectrum, for_density(magnitudes, threshold), peak)
    if target.kind == "bits":
        return _search_bits(spectrum, magnitudes, target.value, peak)
    return _search_error(spectrum, magnitudes, target.value, peak)


def _search_error(
    spectrum: _Spectrum, magnitudes: Magnitudes, limit: float, peak: float
) -> tuple[EncodedSpectrum, EncodingReport]:
    goal = limit
    quantizer = for_error(magnitudes, goal)
    for attempt in range(2 * _ATTEMPTS):
        result = _encode(spectrum, quantizer, peak)
        error = result[1].relative_error
        if error <= limit:
            break
        ratio = 0.998 * limit / error
        goal *= ratio
        if attempt < _ATTEMPTS // 2:
            quantizer = for_error(magnitudes, goal)
        else:  # few distinct magnitudes, which the estimate finds too easy: a finer step always helps
            quantizer = Quantizer(quantizer.dead_zone * ratio, quantizer.step * ratio)
    return result


@dataclass(frozen=True)
class _Setting:
    goal: float  # entropy asked of the quantiser, in bits
    quantizer: Quantizer
    layouts: list[Layout]  # of every frame


def _search_bits(
    spectrum: _Spectrum, magnitudes: Magnitudes, bits: float, peak: float
) -> tuple[EncodedSpectrum, EncodingReport]:
    frames = spectrum.frames

    def for_goal(goal: float, near: _Setting | None) -> _Setting:
        if near:
            return _Setting(goal, _storable(for_bits(magnitudes, goal, near.quantizer), peak), near.layouts)
        quantizer = _storable(for_bits(magnitudes, goal), peak)
        return _Setting(goal, quantizer, _layouts(spectrum, quantizer, peak))

    def corrected(setting: _Setting, ratio: float) -> _Setting:
        # near a tie between two layouts or dead zones, bits would jump back and forth
        return for_goal(setting.goal / ratio, setting if abs(ratio - 1) < _BITS_NEAR else None)

    def miss(result: tuple[EncodedSpectrum, EncodingReport]) -> float:
        return abs(result[1].bits_per_weight / bits - 1)

    setting = for_goal(bits / _EXPECTED_OVERHEAD, None)
    if len(frames) > 2:
        by_energy = sorted(range(len(frames)), key=lambda number: frames[number].energy)
        pilot = by_energy[min(_PILOT, len(frames)) // 2 :: _PILOT]
        some = [frames[number] for number in pilot]
        for _ in range(_ATTEMPTS):
            layouts = [setting.layouts[number] for number in pilot]
            ratio = _pilot_bits(some, layouts, setting.quantizer, peak) / bits
            setting = corrected(setting, ratio)
            if abs(ratio - 1) <= _BITS_TOLERANCE:
                break
    best = result = _encode(spectrum, setting.quantizer, peak, setting.layouts)
    for _ in range(_ATTEMPTS):
        if miss(best) <= _BITS_TOLERANCE:
            break
        setting = corrected(setting, result[1].bits_per_weight / bits)
        result = _encode(spectrum, setting.quantizer, peak, setting.layouts)
        best = min(best, result, key=miss)
    return best


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
    """One layout for all frames of about the same scale, tried on the first of them."""
    dtype, tile = code_dtype(peak, quantizer), spectrum.basis.tile
    found: dict[int, Layout] = {}
    layouts = []
    for frame in spectrum.frames:
        rows, columns = frame.coefficients.shape
        power = frame.energy / (rows * columns)
        scale = round(math.log2(power) / _SAME_SCALE) if power else 0
        if scale not in found:
            width = tile * -(-_TRIED // (rows * tile))
            start = max(columns - width, 0) // 2 // tile * tile
            some = frame.coefficients[:, start : start + width].contiguous()
            found[scale] = choose_layout(quantize(some, quantizer, dtype)[0].reshape(-1).numpy())
        layouts.append(found[scale])
    return layouts


def _encode(
    spectrum: _Spectrum, quantizer: Quantizer, peak: float, layouts: list[Layout] | None = None
) -> tuple[EncodedSpectrum, EncodingReport]:
    frames, threads = spectrum.frames, spectrum.threads
    quantizer = _storable(quantizer, peak)
    dtype = code_dtype(peak, quantizer)
    layouts = layouts or _layouts(spectrum, quantizer, peak)

    def stored(number: int) -> tuple[bytes, Tensor, Moments]:
        frame, layout = frames[number], layouts[number]
        codes, sums = quantize(frame.coefficients, quantizer, dtype)
        flat = codes.reshape(-1).numpy()
        data = encode_frame(flat, layout)
        if not np.array_equal(decode_frame(data, flat.size), flat):
            raise CheckpointError(
                "encode: a frame does not decode to what was encoded. This is a bug: please report it."
            )
        return data, codes, sums

    made = parallel_map(stored, range(len(frames)), threads)
    moments = reduce(add, (sums for _, _, sums in made))
    largest = max(int(codes.abs().max()) for _, codes, _ in made)
    step, offset = reconstruction(moments, largest)
    data = tuple(data for data, _, _ in made)
    steps = torch.tensor([step])
    encoded = EncodedSpectrum(data, spectrum.shape, spectrum.rows_per_frame, steps, offset, spectrum.basis)

    def lost(frame: int) -> float:
        own, codes = frames[frame].coefficients, made[frame][1]
        spans = spectrum.basis.blocks(own.shape)
        return sum(_energy(own[a:b] - dequantize(codes[a:b], steps, offset)) for a, b in spans)

    report = EncodingReport(
        spectrum.shape[0] * spectrum.shape[1],
        encoded.stored_bytes,
        int(moments.kept),
        energy=sum(own.energy for own in frames),
        error_energy=sum(parallel_map(lost, range(len(frames)), threads)),
        stored_energy=moments.energy(step, offset),
    )
    return encoded, report


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _sample(frames: list[_Frame]) -> FloatArray:
    flat = [own.coefficients.reshape(-1) for own in frames]
    stride = max(1, sum(map(len, flat)) // _SAMPLE) | 1  # odd: does not resonate with tiles
    return np.concatenate([own[::stride].numpy() for own in flat])


def _exact_threshold(spectrum: _Spectrum, magnitudes: Magnitudes, density: float) -> float:
    frames = [own.coefficients for own in spectrum.frames]
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
