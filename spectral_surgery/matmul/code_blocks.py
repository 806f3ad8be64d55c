"""Where resident forms come from: spectra in memory or as stored frames, read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_surgery.codec.encoded import Basis, EncodedSpectrum, frame_spans, rows_per_frame
from spectral_surgery.codec.frames import encode_rows
from spectral_surgery.codec.quantized import INT8_MAX, QuantizedSpectrum
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.matmul.levels import grid_of

Spectrum = QuantizedSpectrum | EncodedSpectrum


def basis_of(spectrum: Spectrum) -> Basis:
    """Transform, tile and axes."""
    if isinstance(spectrum, EncodedSpectrum):
        return spectrum.basis
    return Basis(spectrum.transform, spectrum.tile, spectrum.axes)


def reach(codes: Tensor) -> tuple[int, int]:
    """The smallest and the largest code."""
    low, high = torch.aminmax(codes)
    return int(low), int(high)


def refusal(
    spectrum: Spectrum, resident: str, found: tuple[int, int], limits: tuple[int, int], but: str = ""
) -> ConfigError:
    """Why codes, or their offset, do not fit a resident form."""
    (low, high), grid = found, grid_of(spectrum.offset)
    if grid is None and low >= limits[0] and high <= limits[1]:
        return ConfigError(
            f"resident '{resident}': an offset of {spectrum.offset:g} steps is on no grid of int8; expected a multiple"
            " of 1/n, n up to 127. Use coded."
        )
    largest = max(limits[1], INT8_MAX)  # level
    most = largest if grid is None else (largest - max(grid.shift, 0)) // grid.parts
    return ConfigError(
        f"resident '{resident}': codes reach {low} to {high}; expected {max(limits[0], -most)} to"
        f" {min(limits[1], most)} at this offset{but}. Use coded, or fewer bits."
    )


def code_blocks(spectrum: Spectrum, out: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """First row and codes [r, I] of blocks of rows, each about one frame.

    ``out`` is [O, I] int8 on the CPU, where stored int8 codes are decoded to.
    """
    if isinstance(spectrum, EncodedSpectrum):
        height = spectrum.rows_per_frame
        for frame in range(len(spectrum.frames)):
            start = frame * height
            yield start, spectrum.codes(frame, None if out is None else out[start : start + height])
        return
    rows, columns = spectrum.shape
    for start, stop in frame_spans(rows, rows_per_frame(columns, spectrum.tile)):
        yield start, spectrum.codes[start:stop]


def as_encoded(spectrum: Spectrum) -> EncodedSpectrum:
    """The stored form: itself, or encoded now on the CPU without loss."""
    if isinstance(spectrum, EncodedSpectrum):
        return spectrum
    height, frames = encode_rows(spectrum.codes.cpu(), spectrum.tile)
    return EncodedSpectrum(frames, spectrum.shape, height, spectrum.step, spectrum.offset, basis_of(spectrum))


def check(spectrum: Spectrum) -> None:
    """Refuse what no layer can multiply with.

    Raises ShapeError when the spectrum is not that of a non-empty matrix, or its steps do not fit.
    """
    shape, steps = tuple(spectrum.shape), spectrum.step.numel()
    if len(shape) != 2 or not min(shape) or steps not in (1, shape[1]):
        raise ShapeError(f"spectrum: shape {shape} with {steps} steps; expected a non-empty [O, I] with 1 or I steps.")
