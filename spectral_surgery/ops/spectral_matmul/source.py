"""Where resident forms come from: spectra in memory or as stored frames, read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.ops.spectral_matmul.levels import Grid, grid_of
from spectral_surgery.spectra.codec import Basis, EncodedSpectrum, frame_spans, rows_per_frame
from spectral_surgery.spectra.coding import choose_layout, encode_frame
from spectral_surgery.spectra.quantized import QuantizedSpectrum

Spectrum = QuantizedSpectrum | EncodedSpectrum


def basis_of(spectrum: Spectrum) -> Basis:
    """Transform, tile and axes."""
    if isinstance(spectrum, EncodedSpectrum):
        return spectrum.basis
    return Basis(spectrum.transform, spectrum.tile, spectrum.axes)


def integer_grid(spectrum: Spectrum, resident: str) -> Grid:
    """The grid of the reconstruction points.

    Raises:
        ConfigError: when they are on none.
    """
    grid = grid_of(spectrum.offset)
    if grid is None:
        raise ConfigError(
            f"resident '{resident}': an offset of {spectrum.offset:g} steps is on no grid of int8; a multiple of 1/n,"
            " n up to 127, is accepted. Use coded."
        )
    return grid


def code_blocks(spectrum: Spectrum) -> Iterator[tuple[int, Tensor]]:
    """First row and codes [r, I] of blocks of rows, each about one frame."""
    if isinstance(spectrum, EncodedSpectrum):
        for frame in range(len(spectrum.frames)):
            yield frame * spectrum.rows_per_frame, spectrum.codes(frame)
        return
    rows, columns = spectrum.shape
    for start, stop in frame_spans(rows, rows_per_frame(columns, spectrum.tile)):
        yield start, spectrum.codes[start:stop]


def as_encoded(spectrum: Spectrum) -> EncodedSpectrum:
    """The stored form: itself, or encoded now on the CPU without loss."""
    if isinstance(spectrum, EncodedSpectrum):
        return spectrum
    codes = spectrum.codes.cpu()
    height = rows_per_frame(codes.shape[1], spectrum.tile)
    flat = [codes[a:b].reshape(-1).numpy() for a, b in frame_spans(len(codes), height)]
    layout = choose_layout(flat[len(flat) // 2])
    frames = tuple(encode_frame(part, layout) for part in flat)
    return EncodedSpectrum(frames, spectrum.shape, height, spectrum.step, spectrum.offset, basis_of(spectrum))


def check(spectrum: Spectrum) -> None:
    """Refuse what no layer can multiply with.

    Raises:
        ShapeError: when the spectrum is not that of a non-empty matrix, or its steps do not fit.
    """
    shape, steps = tuple(spectrum.shape), spectrum.step.numel()
    if len(shape) != 2 or not min(shape) or steps not in (1, shape[1]):
        raise ShapeError(
            f"spectrum: shape {shape} with {steps} steps; a non-empty [O, I] with 1 or I steps is accepted."
        )


def refuse_codes(resident: str, low: int, high: int, limit: str, remedy: str) -> ConfigError:
    """The error for codes that do not fit a form."""
    return ConfigError(f"resident '{resident}': codes reach {low} to {high}; {limit} are accepted. Use {remedy}.")


def extremes(codes: Tensor) -> tuple[int, int]:
    """Smallest and largest code."""
    low, high = torch.aminmax(codes)
    return int(low), int(high)
