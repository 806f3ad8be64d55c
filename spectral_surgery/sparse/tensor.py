"""A tensor as its largest spectral coefficients: few values and their positions.

This is the plain form of a spectrum, easy to read and to compute with. It is not the small one:
values and positions cost far more than entropy-coded integers at the same error (see
`quantized` and `coding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError, DomainError, ShapeError
from spectral_surgery.sparse import files as sparse_io
from spectral_surgery.sparse.domain import RFFT2, Domain

_INT32_NUMEL = 1 << 31


@dataclass(frozen=True, eq=False)
class SparseSpectralTensor:
    """The kept coefficients of an orthonormal transform of a tensor; make one with `sst`.

    By Parseval the squared error of `to_spatial` is the energy of what was dropped or rounded.

    Attributes:
        values: [K] float32, float16 or bfloat16; complex64 for rfft2.
        positions: [K] int32 (int64 beyond 2^31 weights), strictly increasing: row-major places
            in the spectrum.
        shape: Of the spatial tensor.
        tile: Points in a tile, P; None for whole axes.
        transform: A name in TRANSFORMS, or "rfft2".
        axes: Transformed axes of the tensor seen as a matrix [O, I], 0 for O and 1 for I.
        dtype: Of the spatial tensor.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, ...]
    tile: int | None
    transform: str
    axes: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def domain(self) -> Domain:
        """Shape, tile, transform and axes as one value."""
        return Domain(self.shape, self.tile, self.transform, self.axes)

    @property
    def kept(self) -> int:
        """Real numbers kept; for rfft2 a conjugate pair counts as two."""
        return int(self.domain.freedom(self.positions).sum())

    @property
    def density(self) -> float:
        """Fraction of the real coefficients kept."""
        return self.kept / self.domain.numel

    @property
    def stored_bytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.positions.nbytes

    def compress_ratio(self) -> float:
        """Return the bytes of the spatial tensor over `stored_bytes`, positions counted.

        Keeping 20 % of a bfloat16 tensor as bfloat16 values and int32 positions costs 9.6 bits per
        weight: a ratio of 1.67, not 5. Of a float32 tensor in float32 it costs 12.8: a ratio of
        2.5. Entropy-coded codes store the same error in about 1.4 bits.
        """
        return self.domain.numel * self.dtype.itemsize / self.stored_bytes

    def memory_mb(self) -> float:
        """Return `stored_bytes` in units of 1024^2 bytes."""
        return self.stored_bytes / 1024**2

    def to_spatial(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor, of `shape`; computed in float32 and cast once.

        ``dtype``: Of the result; None for the dtype of the original.
        """
        wide = torch.complex64 if self.values.is_complex() else torch.float32
        rows, columns = self.domain.spectrum_shape
        spectrum = torch.zeros(rows * columns, dtype=wide, device=self.values.device)
        spectrum.index_copy_(0, self.positions.long(), self.values.to(wide))
        return self.domain.inverse(spectrum.reshape(rows, columns)).to(dtype or self.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """Return x @ W.T, [..., I] -> [..., O], without forming the weight W = to_spatial().

        The input is transformed, the sparse spectrum multiplies it, and the product is transformed back: y = T_out^T (C
        (T_in x)). Differentiable in `x`. Computed in float32, or in float64 for float64, and returned in the dtype of
        `x`. ``x`` is [..., I] real floating, on the device of the spectrum.

        Raises:
            ShapeError: If the spectrum is not that of a matrix, or the width of `x` is not I.
            DomainError: If `x` is a spectrum, or not real floating.
        """
        if len(self.shape) != 2:
            raise ShapeError(
                f"matmul: expected the spectrum of a matrix [O, I], got that of a tensor of shape {self.shape}. "
                "Reshape the tensor before sst()."
            )
        _require_spatial("matmul", x)
        if not x.is_floating_point():
            raise DomainError(f"matmul: expected a real floating x, got {x.dtype}. Convert x first.")
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:
            raise ShapeError(
                f"matmul: expected x [..., {self.shape[1]}] for a spectrum of shape {self.shape}, got shape"
                f" {tuple(x.shape)}."
            )
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        frequencies = self.domain.from_input(x.reshape(-1, self.shape[1]).to(exact))  # [N, I or F]
        product = torch.sparse.mm(self._coo(frequencies.dtype), frequencies.T)  # [O, N]
        y = self.domain.to_output(product.T)  # [N, O]
        return y.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; equal spectra give equal bytes."""
        stored = sparse_io.Stored(self.values, self.positions, self.domain, self.dtype)
        sparse_io.write(Path(path), stored)

    @staticmethod
    def load(path: str | Path) -> SparseSpectralTensor:
        """Read a file written by `save`, onto the CPU.

        Raises:
            FormatVersionError: If the file has another format version.
            CheckpointError: If the file is missing, damaged, or not a valid spectrum.
        """
        stored = sparse_io.read(Path(path))
        return _build(stored.values, stored.positions, stored.domain, stored.dtype)

    def __add__(self, other: object) -> SparseSpectralTensor:
        """Add two spectra of one domain exactly: at the union of their positions, nothing dropped.

        Sums are rounded to the wider of the two value dtypes.
        """
        other = self._require_same_domain("+", other)
        wide = torch.promote_types(self.values.dtype, other.values.dtype)
        exact = torch.promote_types(wide, torch.float32)
        both = torch.cat((self.positions, other.positions))
        positions, place = torch.unique(both, return_inverse=True)
        values = torch.zeros(len(positions), dtype=exact, device=both.device)
        values.index_add_(0, place, torch.cat((self.values.to(exact), other.values.to(exact))))
        dtype = torch.promote_types(self.dtype, other.dtype)
        return _build(values.to(wide), positions, self.domain, dtype)

    def __sub__(self, other: object) -> SparseSpectralTensor:
        """Subtract a spectrum of the same domain, exactly as `+`."""
        return self + self._require_same_domain("-", other) * -1

    def __mul__(self, other: object) -> SparseSpectralTensor:
        """Multiply by a number, or elementwise by another spectrum of the same domain.

        A product of tensors is a convolution of their spectra, not a product. So it is taken in
        space and transformed again, and keeps as many coefficients as the denser operand: it is an
        approximation, unlike every other operation here.
        """
        if isinstance(other, (int, float)):
            return _build(self.values * other, self.positions, self.domain, self.dtype)
        other = self._require_same_domain("*", other)
        product = self.to_spatial(torch.float32) * other.to_spatial(torch.float32)
        wide = torch.promote_types(self.values.dtype, other.values.dtype)
        dtype = torch.promote_types(self.dtype, other.dtype)
        return _keep(product, max(self.kept, other.kept), self.domain, wide, dtype)

    def __rmul__(self, other: object) -> SparseSpectralTensor:
        """Multiply by a number."""
        return self * other

    def __radd__(self, other: object) -> NoReturn:
        """Refuse: only a spectrum can be added to a spectrum."""
        _refuse("+", other)

    def __rsub__(self, other: object) -> NoReturn:
        """Refuse: only a spectrum can be subtracted from a spectrum."""
        _refuse("-", other)

    def __repr__(self) -> str:
        """Return a summary on one line."""
        return (
            f"SparseSpectralTensor(shape={self.shape}, transform={self.transform!r}, "
            f"tile={self.tile}, axes={self.axes}, density={self.density:.4g}, "
            f"values={self.values.dtype}, stored_bytes={self.stored_bytes})"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> NoReturn:
        """Refuse torch functions: a spectrum is not a spatial tensor."""
        _refuse(getattr(func, "__name__", str(func)), None)

    def __array__(self, dtype: object = None, copy: object = None) -> NoReturn:
        """Refuse numpy: a spectrum is not a spatial array."""
        _refuse("numpy array", None)

    def __dlpack__(self, stream: object = None) -> NoReturn:
        """Refuse torch.as_tensor and its like: a spectrum is not a spatial tensor."""
        _refuse("as_tensor", None)

    def __dlpack_device__(self) -> NoReturn:
        """Refuse torch.as_tensor and its like, which ask for this first."""
        _refuse("as_tensor", None)

    def _coo(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.domain.spectrum_shape
        positions = self.positions.long()
        indices = torch.stack((positions // columns, positions % columns))
        # a conjugate pair contributes twice the real part of the one that is stored
        values = self.values.to(dtype) * self.domain.freedom(positions)
        return torch.sparse_coo_tensor(indices, values, (rows, columns), is_coalesced=True, check_invariants=False)

    def _require_same_domain(self, operation: str, other: object) -> SparseSpectralTensor:
        if not isinstance(other, SparseSpectralTensor):
            _refuse(operation, other)
        if self.domain != other.domain:
            raise DomainError(
                f"{operation}: expected spectra of the same shape, tile, transform and axes, got {self.domain} and"
                f" {other.domain}. Call to_spatial() on both first."
            )
        return other


def sst(
    tensor: Tensor,
    sparsity: float = 0.2,
    *,
    transform: str = "dct",
    tile: int | None = 128,
    axes: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> SparseSpectralTensor:
    """Keep the largest spectral coefficients of a tensor.

    On weights that look like white noise this loses as much as pruning: keeping 20 % of a real transform leaves a
    relative error of 0.59, and of rfft2 0.69, since it keeps or drops two numbers at a time. Returns the spectrum, on
    the device of `tensor`.

    Args:
        tensor: One or more dimensions, floating and finite. A vector is seen as one row, more than
            two dimensions as [shape[0], -1].
        sparsity: The fraction of coefficients KEPT (0.2 keeps 20 %), above 0 and up to 1: exactly
            max(1, round(sparsity * numel)) of them. Among equal magnitudes the first are kept.
        transform: A name in TRANSFORMS, or "rfft2": the half-plane Fourier transform of the
            whole matrix, with conjugate pairs kept together and counted as two (so that one less
            may be kept than asked for, or one more where a single pair is all there is).
        tile: Points in a tile, P; None for whole axes, at most 8192 points each. rfft2 has none.
        axes: Axes to transform, 0 for O and 1 for I; None for all (a vector has only axis 1).
        dtype: Of the stored values: float32, float16 or bfloat16; rfft2 stores complex64.

    Raises:
        ConfigError: If the dtype of `tensor`, its values, or an option is not accepted.
        DomainError: If `tensor` is not a tensor, such as a spectrum.
        ShapeError: If `tensor` holds no weights or has no dimension.
        LimitError: If a tile is longer than 8192.
    """
    _require_spatial("sst", tensor)
    if tensor.dtype not in sparse_io.DTYPES.values():
        raise ConfigError(f"sst: expected a tensor of {', '.join(sparse_io.DTYPES)}, got {tensor.dtype}.")
    if not 0 < sparsity <= 1:
        raise ConfigError(
            f"sst: expected a sparsity above 0 and up to 1, the fraction to keep, got {sparsity}. Use 0.2 to keep 20 %."
        )
    if dtype not in sparse_io.VALUE_DTYPES or (transform == RFFT2 and dtype != torch.float32):
        raise ConfigError(
            f"sst: expected torch.float32, and for real transforms torch.float16 and torch.bfloat16, got {dtype} for"
            f" {transform}."
        )
    if axes is None:
        axes = (1,) if tensor.ndim == 1 and transform != RFFT2 else (0, 1)
    shape = tuple(tensor.shape)
    domain = Domain(shape, None if transform == RFFT2 else tile, transform, tuple(axes))
    domain.check()
    if not tensor.isfinite().all():
        raise ConfigError("sst: expected finite values, got a tensor that is not finite.")
    stored = torch.complex64 if transform == RFFT2 else dtype
    count = max(1, round(sparsity * tensor.numel()))
    return _keep(tensor.detach(), count, domain, stored, tensor.dtype)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the largest scores, increasing; among equal scores the first win.

    Returns [count] int64. Unlike `torch.topk`, the same for the same scores everywhere.

    ``scores``: [n], no NaN.
    """
    threshold = scores.kthvalue(len(scores) - count + 1).values
    keep = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return keep.nonzero().squeeze(1)


def _keep(x: Tensor, count: int, domain: Domain, stored: torch.dtype, dtype: torch.dtype) -> SparseSpectralTensor:
    spectrum = domain.forward(x).reshape(-1)
    if domain.half_plane:
        positions = _largest_pairs(spectrum.abs(), domain, count)
    else:
        positions = largest(spectrum.abs(), count)
    values = spectrum[positions].to(stored)
    if not values.isfinite().all():
        peak = float(spectrum.abs().max())
        raise ConfigError(
            f"sst: expected coefficients that fit {stored}, got one of {peak:.3g}. Store torch.float32 or"
            " torch.bfloat16, or scale the tensor."
        )
    return _build(values, positions, domain, dtype)


def _largest_pairs(magnitudes: Tensor, domain: Domain, count: int) -> Tensor:
    freedom = domain.freedom(torch.arange(len(magnitudes), device=magnitudes.device))
    # a pair carries twice the energy and costs twice: per number kept, the magnitude decides
    order = magnitudes.sort(descending=True, stable=True).indices
    order = order[freedom[order] > 0]
    fits = freedom[order].cumsum(0) <= count
    return order[: max(1, int(fits.sum()))].sort().values


def _build(values: Tensor, positions: Tensor, domain: Domain, dtype: torch.dtype) -> SparseSpectralTensor:
    integer = torch.int32 if domain.numel < _INT32_NUMEL else torch.int64
    return SparseSpectralTensor(
        values, positions.to(integer), domain.shape, domain.tile, domain.transform, domain.axes, dtype
    )


def _require_spatial(where: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise DomainError(
            f"{where}: expected a spatial tensor, got a {type(x).__name__}. Call to_spatial() on a spectrum first."
        )


def _refuse(where: str, other: object) -> NoReturn:
    with_what = f" with a {type(other).__name__}" if other is not None else ""
    raise DomainError(
        f"{where}: expected spectra of one domain or, in products, numbers, got a SparseSpectralTensor{with_what}."
        " Call to_spatial() first."
    )
