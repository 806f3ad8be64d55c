"""The weight of a spectral layer while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_surgery.codec.quantized import INT8_MAX, QuantizedSpectrum
from spectral_surgery.layers.kept_spectrum import KeptSpectrum
from spectral_surgery.layers.weight import SpectralWeight
from spectral_surgery.matmul import Form


class TrainableWeight(nn.Module):
    """Takes the place of a `SpectralWeight`, with its kept coefficients as a parameter; the matrix is dense in use.

    ``values``: [K] float32 parameter.
    """

    def __init__(self, weight: SpectralWeight) -> None:
        super().__init__()
        self.kept = KeptSpectrum([part for form in weight.forms for part in _spectra(form)], weight.shape)
        self.values = nn.Parameter(self.kept.start)
        self.register_buffer("_like", torch.empty(0, dtype=weight.dtype), persistent=False)
        self.to(weight.forms[0].scale.device)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.kept.shape
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """Floating type that the matrix counts as."""
        return self.get_buffer("_like").dtype

    @property
    def bits_per_weight(self) -> float:
        """Of the parameter: 32 for every kept coefficient."""
        rows, columns = self.shape
        return 32 * self.values.numel() / (rows * columns)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + b: [..., I] to [..., O]."""
        return functional.linear(x, self.to_dense(x.dtype), bias)

    def matmul_transposed(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W + b: [..., O] to [..., I]."""
        return functional.linear(x, self.to_dense(x.dtype).T, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W: [...] integers to [..., I] float32."""
        embedded: Tensor = functional.embedding(ids, self.kept(self.values))
        return embedded

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W: [O, I], as it would be stored now."""
        weight: Tensor = self.kept(self.values)
        return weight.to(dtype or self.dtype)

    def settled(self, resident: str) -> SpectralWeight:
        """The weight as it would be stored now, in memory in some resident form.

        Raises ConfigError when the codes do not fit the resident form.
        """
        weight = SpectralWeight.from_spectra(self.kept.spectra(self.values), resident, self.dtype)
        return weight.to(self.values.device)


def _spectra(form: Form) -> Iterator[QuantizedSpectrum]:
    """Of row ranges, each with the same scale for all its rows."""
    scales = form.row_scale.cpu() if len(form.row_scale) else torch.ones(form.shape[0])
    changes = (scales.diff().nonzero()[:, 0] + 1).tolist()
    for start, stop in pairwise([0, *changes, form.shape[0]]):
        levels = form.levels(torch.arange(start, stop, device=form.scale.device)).float().cpu()
        yield _spectrum(levels, form.scale.float().cpu() * scales[start], form)


def _spectrum(levels: Tensor, step: Tensor, form: Form) -> QuantizedSpectrum:
    offset, basis = float(getattr(form, "offset", 0.0)), form.basis
    codes = (levels.abs() - offset).round_().clamp_(min=0).copysign_(levels)
    if not offset and int(codes.abs().max()) > INT8_MAX // 2:  # training needs room above, in int8
        codes, step = (codes / 2).round_(), 2 * step
    return QuantizedSpectrum(codes.to(torch.int32), step, offset, basis.transform, basis.tile, basis.axes)
