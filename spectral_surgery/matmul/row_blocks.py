"""Y = x Wᵀ from a block of rows of the spectrum at a time: never more than block_size rows of it as numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectral_surgery.codec.quantized import QuantizedSpectrum, dequantize
from spectral_surgery.errors import ConfigError, DomainError, ShapeError
from spectral_surgery.matmul.activations import to_space, to_spectrum
from spectral_surgery.matmul.code_blocks import basis_of
from spectral_surgery.sparse.tensor import SparseSpectralTensor

Weights = SparseSpectralTensor | QuantizedSpectrum | Tensor
Rows = Callable[[int, int], Tensor]


def block_streaming_matmul(x: Tensor, weights: Weights, block_size: int = 512) -> Tensor:
    """Multiply by a weight that is only known as a spectrum, streaming over rows of the spectrum.

    A block of rows or columns of a spectrum is not a block of the weight: every coefficient reaches every weight of its
    tile (of the whole matrix, for a Fourier spectrum). What is exact is to transform x, to take the products with the
    rows of the spectrum block by block, and to transform them back. Differentiable in x. Returns [..., O] in the dtype
    of x, computed in float32, or in float64 for float64.

    Args:
        x: [..., I] real floating.
        weights: of an [O, I] weight W: a sparse spectrum, codes, or the complex matrix ``torch.fft.fft2(W)``.
        block_size: rows of the spectrum at a time, 1 or more.

    Raises:
        ShapeError: when the weights are not a matrix, or the width of x is not I.
        DomainError: when x is not real floating, or the weights are a real tensor, which is not a spectrum.
        ConfigError: when block_size is less than 1.
    """
    shape = tuple(weights.shape)
    if block_size < 1:
        raise ConfigError(f"block_streaming_matmul: block_size {block_size}; expected 1 or more.")
    if len(shape) != 2:
        raise ShapeError(f"block_streaming_matmul: the weights are {shape}; expected a matrix [O, I].")
    if not x.is_floating_point():
        raise DomainError(f"block_streaming_matmul: x is {x.dtype}; expected a real floating type.")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ShapeError(f"block_streaming_matmul: x is {tuple(x.shape)}; expected [..., {shape[1]}].")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(-1, shape[1]).to(exact)
    if isinstance(weights, SparseSpectralTensor):
        inside = weights.domain.from_input(flat)
        y = weights.domain.to_output(_stream(inside, shape[0], block_size, _sparse_rows(weights, inside.dtype)))
    elif isinstance(weights, QuantizedSpectrum):
        basis = basis_of(weights)
        y = to_space(_stream(to_spectrum(flat, basis), shape[0], block_size, _coded_rows(weights, exact)), basis)
    else:
        y = _fourier(flat, weights, block_size)
    return y.reshape(*x.shape[:-1], shape[0]).to(x.dtype)


def _stream(x: Tensor, count: int, block_size: int, rows: Rows) -> Tensor:
    spans = [(start, min(start + block_size, count)) for start in range(0, count, block_size)]
    return torch.cat([x @ rows(start, stop).T for start, stop in spans], 1)


def _fourier(x: Tensor, spectrum: Tensor, block_size: int) -> Tensor:
    """With W = Re ifft2(F): y = Re ifft(ifft(x) Fᵀ), as Fourier matrices are symmetric."""
    if not spectrum.is_complex():
        raise DomainError(
            f"block_streaming_matmul: the weights are a {spectrum.dtype} tensor; expected a spectrum: of sst(), of"
            " codes, or the complex torch.fft.fft2(W)."
        )
    inside = torch.fft.ifft(x)
    y = _stream(inside, len(spectrum), block_size, lambda start, stop: spectrum[start:stop].to(inside.dtype))
    whole: Tensor = torch.fft.ifft(y)
    return whole.real


def _coded_rows(spectrum: QuantizedSpectrum, dtype: torch.dtype) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        return dequantize(spectrum.codes[start:stop], spectrum.step, spectrum.offset).to(dtype)

    return rows


def _sparse_rows(sparse: SparseSpectralTensor, dtype: torch.dtype) -> Rows:
    width = sparse.domain.spectrum_shape[1]

    def rows(start: int, stop: int) -> Tensor:
        limits = sparse.positions.new_tensor([start * width, stop * width])
        first, last = torch.searchsorted(sparse.positions, limits).tolist()
        positions = sparse.positions[first:last].long()
        # one of a conjugate pair is stored and stands for both
        values = sparse.values[first:last].to(dtype) * sparse.domain.freedom(positions)
        block = values.new_zeros((stop - start) * width)
        return block.index_copy_(0, positions - start * width, values).reshape(stop - start, width)

    return rows
