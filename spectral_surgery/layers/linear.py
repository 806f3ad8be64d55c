"""A linear layer whose weight stays a spectrum."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.errors import ShapeError
from spectral_surgery.layers.weight import Spectra, SpectralWeight, compressed


class SpectralLinear(nn.Module):
    """Drop-in for nn.Linear: y = x Wᵀ + b, with W a `SpectralWeight`.

    Attributes:
        spectrum: W.
        bias: [O] parameter, or None.
    """

    def __init__(self, spectrum: SpectralWeight, bias: Tensor | None = None) -> None:
        """Put a layer around a weight, which several layers may share (tied embeddings).

        Raises ShapeError when the bias is not [O].
        """
        super().__init__()
        self.out_features, self.in_features = spectrum.shape
        self.spectrum = spectrum
        self.bias = bias_parameter(bias, self.out_features)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        sparsity: float | None = None,
        bits: float | None = None,
        max_error: float | None = None,
        transform: str = "dct",
        tile: int = 64,
        resident: str = "int8",
    ) -> Self:
        """Compress a linear layer; it is not changed.

        Args:
            sparsity: fraction of coefficients KEPT; exactly one of this, bits and max_error is given.
            bits: stored bits per weight.
            max_error: relative Frobenius error of the weight.
            transform: name in TRANSFORMS.

        Raises:
            ConfigError: when none or several targets are given, or the codes do not fit the resident form.
        """
        targets = {"density": sparsity, "bits": bits, "max_error": max_error}
        weight = compressed(linear.weight, targets, Basis(transform, tile), resident)
        return cls(weight, linear.bias)

    @classmethod
    def from_quantized(
        cls, spectra: Spectra, bias: Tensor | None = None, resident: str = "int8", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Make a layer of a spectrum, or of spectra of consecutive row ranges: codes, or stored frames.

        Args:
            bias: [O].
            dtype: floating type that the weight counts as.

        Raises:
            ConfigError: when the codes do not fit the resident form.
            ShapeError: when shapes do not fit each other.
        """
        return cls(SpectralWeight.from_spectra(spectra, resident, dtype), bias)

    @property
    def weight(self) -> Tensor:
        """A dense copy of W, decompressed anew on every use: writing into it changes nothing."""
        return self.spectrum.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] floating to [..., O] in its dtype (under autocast: in the autocast dtype).

        Raises:
            ShapeError: when the width of x is not I.
            ConfigError: when x is not floating.
        """
        return self.spectrum.matmul(autocast_input(x), self.bias)

    def to_dense(self) -> nn.Linear:
        """The same layer with the decompressed weight."""
        return dense_linear(self.spectrum.to_dense(), self.bias)

    def extra_repr(self) -> str:
        """Sizes and cost."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" bits_per_weight={self.spectrum.bits_per_weight:.3g}"
        )


def bias_parameter(bias: Tensor | None, out_features: int) -> nn.Parameter | None:
    """A copy of a bias. Raises ShapeError when it is not [O]."""
    if bias is None:
        return None
    if tuple(bias.shape) != (out_features,):
        raise ShapeError(f"bias: expected ({out_features},), got {tuple(bias.shape)}.")
    return nn.Parameter(bias.detach().clone())


def autocast_input(x: Tensor) -> Tensor:
    """What nn.Linear would multiply: x in the autocast dtype where autocast is on."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of a given weight [O, I] and a copy of a bias [O]."""
    rows, columns = weight.shape
    dense = nn.Linear(columns, rows, bias=False, device="meta")
    dense.weight = nn.Parameter(weight)
    dense.register_parameter("bias", bias_parameter(bias, rows))
    return dense
