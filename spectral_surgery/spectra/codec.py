"""A matrix to its stored form and back: transform, choose, quantise, code, verify, one frame at a time.

A frame is a whole number of rows of tiles with at least 2^18 coefficients, so that the tables of the entropy coder
cost nothing, and it decodes alone. Every step works on one frame with one thread, hence the bytes do not depend on
how many threads or processes share the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError, ConfigError, ShapeError
from spectral_surgery.spectra.coding import Layout, choose_layout, decode_frame, encode_frame
from spectral_surgery.spectra.parallel import one_torch_thread, parallel_map
from spectral_surgery.spectra.quantized import (
    Moments,
    QuantizedSpectrum,
    code_dtype,
    dequantize,
    quantize,
    reconstruction,
)
from spectral_surgery.spectra.select import Magnitudes, Quantizer, Target, for_bits, for_density, for_error
from spectral_surgery.transforms import TRANSFORMS, tiles

FloatArray = npt.NDArray[np.float32]

FRAME_SIZE = 1 << 18  # coefficients: smaller frames pay for their tables, larger ones delay the first row
COLUMN_STEP_BITS = 16  # of each of many steps, stored in bfloat16
_SAMPLE = 1 << 17
_ATTEMPTS = 6
_BITS_TOLERANCE = 0.004
_BITS_NEAR = 0.05
_EXPECTED_OVERHEAD = 1.014
_SMALLEST, _LARGEST = 1e-30, 1e25  # float32 has no headroom for reciprocals of smaller numbers and sums of larger ones
_MAX_CODE = 1 << 30


@dataclass(frozen=True)
class Basis:
    """The transform of a matrix: name in TRANSFORMS, tile side, transformed axes (0 for O, 1 for I)."""

    transform: str = "dct"
    tile: int = 64
    axes: tuple[int, ...] = (0, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, I] any float type to [rows, I] float32 coefficients; rows start on a tile boundary."""
        return tiles.forward(rows.to(torch.float32), TRANSFORMS[self.transform], self.tile, self.axes)

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Inverse of `forward`."""
        return tiles.inverse(coefficients, TRANSFORMS[self.transform], self.tile, self.axes)


@dataclass(frozen=True)
class EncodedSpectrum:
    """The stored form of one matrix.

    Attributes:
        frames: encoded frames, each of ``rows_per_frame`` rows (the last one may have fewer).
        shape: (O, I).
        rows_per_frame: rows of a frame, a multiple of the tile.
        step: reconstruction step, see QuantizedSpectrum.
        offset: reconstruction offset, in steps.
        basis: transform, tile and axes.
    """

    frames: tuple[bytes | memoryview, ...]
    shape: tuple[int, int]
    rows_per_frame: int
    step: Tensor
    offset: float
    basis: Basis

    @property
    def stored_bytes(self) -> int:
        """Bytes of the frames, their 64-bit offsets, the steps and the offset."""
        bits = 32 if self.step.numel() == 1 else COLUMN_STEP_BITS
        return sum(map(len, self.frames)) + 8 * (len(self.frames) + 1) + bits * (self.step.numel() + 1) // 8

    def codes(self, frame: int, out: Tensor | None = None) -> Tensor:
        """[rows, I] codes of one frame; in ``out``, contiguous [rows, I] int8, where it is given and they are int8."""
        start = frame * self.rows_per_frame
        stop = min(start + self.rows_per_frame, self.shape[0])
        place = None if out is None else out.view(-1).numpy()
        flat = decode_frame(self.frames[frame], (stop - start) * self.shape[1], place)
        return torch.from_numpy(flat).reshape(stop - start, self.shape[1])

    def decode(self) -> QuantizedSpectrum:
        """Every frame decoded, as one spectrum of codes."""
        parts = [self.codes(i) for i in range(len(self.frames))]
        widest = max((p.dtype for p in parts), key=lambda d: d.itemsize)
        codes = torch.cat([p.to(widest) for p in parts])
        return QuantizedSpectrum(codes, self.step, self.offset, self.basis.transform, self.basis.tile, self.basis.axes)

    def dense_frame(self, frame: int) -> Tensor:
        """[rows, I] float32 rows of the matrix that one frame holds."""
        return self.basis.inverse(dequantize(self.codes(frame), self.step, self.offset))

    def to_dense(self, *, threads: int = 1) -> Tensor:
        """The matrix: [O, I] float32."""
        return torch.cat(parallel_map(self.dense_frame, range(len(self.frames)), threads))


@dataclass(frozen=True)
class EncodingReport:
    """What an encoding cost and what it left; sums, so that the reports of several matrices add up.

    Attributes:
        weights: number of weights.
        stored_bytes: see EncodedSpectrum.
        kept: non-zero coefficients.
        energy: squared norm of the matrix.
        error_energy: squared norm of what is lost, measured on the decoded frames.
        stored_energy: squared norm of the decoded matrix.
    """

    weights: int
    stored_bytes: int
    kept: int
    energy: float
    error_energy: float
    stored_energy: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, every byte counted."""
        return 8 * self.stored_bytes / max(self.weights, 1)

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the error over that of the matrix; 0 for a zero matrix."""
        return math.sqrt(self.error_energy / self.energy) if self.energy else 0.0

    @property
    def density(self) -> float:
        """Fraction of coefficients kept."""
        return self.kept / max(self.weights, 1)

    def __add__(self, other: EncodingReport) -> EncodingReport:
        """Report of two matrices together."""
        return EncodingReport(
            self.weights + other.weights,
            self.stored_bytes + other.stored_bytes,
            self.kept + other.kept,
            self.energy + other.energy,
            self.error_energy + other.error_energy,
            self.stored_energy + other.stored_energy,
        )


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
        frames = parallel_map(lambda span: _frame(basis.forward(weight[slice(*span)])), spans, threads)
        return _search(_Spectrum(frames, height, basis, threads), target)


def frame_spans(rows: int, rows_per_frame: int) -> list[tuple[int, int]]:
    """Row ranges of the frames of a matrix."""
    return [(start, min(start + rows_per_frame, rows)) for start in range(0, rows, rows_per_frame)]


def rows_per_frame(columns: int, tile: int) -> int:
    """Rows of a frame: whole tiles, with at least FRAME_SIZE coefficients."""
    return tile * -(-FRAME_SIZE // (columns * tile))


@dataclass(frozen=True)
class _Frame:
    coefficients: Tensor  # [rows, I] float32
    peak: float  # the largest magnitude
    energy: float


def _frame(coefficients: Tensor) -> _Frame:
    return _Frame(coefficients, float(coefficients.abs().max()), _energy(coefficients))  # while the cache has it


@dataclass(frozen=True)
class _Spectrum:
    frames: list[_Frame]
    rows_per_frame: int
    basis: Basis
    threads: int
    layout: Layout | None = None  # None: chosen when encoding

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


def _search_bits(
    spectrum: _Spectrum, magnitudes: Magnitudes, bits: float, peak: float
) -> tuple[EncodedSpectrum, EncodingReport]:
    goal = bits / _EXPECTED_OVERHEAD
    frames = spectrum.frames
    layout: Layout | None = None

    def attempt(some: _Spectrum) -> tuple[float, tuple[EncodedSpectrum, EncodingReport]]:
        nonlocal goal, layout
        quantizer = for_bits(magnitudes, goal)
        tried = layout or _layout(spectrum, quantizer, code_dtype(peak, quantizer))
        result = _encode(replace(some, layout=tried), quantizer, peak)
        ratio = result[1].bits_per_weight / bits
        goal /= ratio
        if abs(ratio - 1) < _BITS_NEAR:  # near a tie between two layouts, bits would jump back and forth
            layout = tried
        return abs(ratio - 1), result

    if len(frames) > 8:
        pilot = replace(spectrum, frames=frames[:: len(frames) // 4])
        for _ in range(_ATTEMPTS):
            if attempt(pilot)[0] <= _BITS_TOLERANCE:
                break
    miss, best = attempt(spectrum)
    for _ in range(_ATTEMPTS):
        if miss <= _BITS_TOLERANCE:
            break
        next_miss, candidate = attempt(spectrum)
        if next_miss < miss:
            miss, best = next_miss, candidate
    return best


def _layout(spectrum: _Spectrum, quantizer: Quantizer, dtype: torch.dtype) -> Layout:
    middle = spectrum.frames[len(spectrum.frames) // 2].coefficients
    return choose_layout(quantize(middle, quantizer, dtype)[0].reshape(-1).numpy())


def _encode(spectrum: _Spectrum, quantizer: Quantizer, peak: float) -> tuple[EncodedSpectrum, EncodingReport]:
    frames, threads = spectrum.frames, spectrum.threads
    if quantizer.step < peak / _MAX_CODE:
        step = peak / _MAX_CODE
        quantizer = Quantizer(max(quantizer.dead_zone, step / 2), step)
    dtype = code_dtype(peak, quantizer)
    layout = spectrum.layout or _layout(spectrum, quantizer, dtype)

    def stored(frame: _Frame) -> tuple[bytes, Tensor, Moments]:
        codes, sums = quantize(frame.coefficients, quantizer, dtype)
        flat = codes.reshape(-1).numpy()
        data = encode_frame(flat, layout)
        if not np.array_equal(decode_frame(data, flat.size), flat):
            raise CheckpointError(
                "encode: a frame does not decode to what was encoded. This is a bug: please report it."
            )
        return data, codes, sums

    made = parallel_map(stored, frames, threads)
    moments = reduce(add, (sums for _, _, sums in made))
    largest = max(int(codes.abs().max()) for _, codes, _ in made)
    step, offset = reconstruction(moments, largest)
    data = tuple(data for data, _, _ in made)
    steps = torch.tensor([step])
    encoded = EncodedSpectrum(data, spectrum.shape, spectrum.rows_per_frame, steps, offset, spectrum.basis)

    def lost(frame: int) -> float:
        return _energy(frames[frame].coefficients - dequantize(made[frame][1], steps, offset))

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
