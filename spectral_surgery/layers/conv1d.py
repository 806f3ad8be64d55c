"""GPT-2's Conv1D, a linear layer that stores its weight transposed, with the weight as a spectrum."""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.errors import ConfigError
from spectral_surgery.layers.linear import autocast_input, bias_parameter, dense_linear
from spectral_surgery.layers.weight import Spectra, SpectralWeight, compressed
from spectral_surgery.matmul import LevelForm, transposed_form


class SpectralConv1D(nn.Module):
    """Drop-in for transformers' Conv1D: y = x V + b with V [I, O].

    Attributes:
        nx: I, also ``in_features``.
        nf: O, also ``out_features``.
        spectrum: of V as checkpoints store it; or of Vᵀ, where codes could be laid out so.
        transposed: whether the spectrum is that of Vᵀ.
    """

    def __init__(self, spectrum: SpectralWeight, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        rows, columns = spectrum.shape
        self.nx, self.nf = (columns, rows) if transposed else (rows, columns)
        self.in_features, self.out_features = self.nx, self.nf
        self.spectrum, self.transposed = spectrum, transposed
        self.bias = bias_parameter(bias, self.nf)

    @classmethod
    def from_dense(
        cls,
        conv1d: nn.Module,
        *,
        sparsity: float | None = None,
        bits: float | None = None,
        max_error: float | None = None,
        transform: str = "dct",
        tile: int = 64,
        resident: str = "int8",
    ) -> Self:
        """Compress a Conv1D, which is not changed; settings as of `SpectralLinear.from_dense`.

        Args:
            conv1d: with ``weight`` [I, O], ``bias`` [O] or None, and ``nf``.

        Raises:
            ConfigError: when it is not a Conv1D, none or several targets are given, or the codes do not fit.
        """
        if not hasattr(conv1d, "nf") or not isinstance(getattr(conv1d, "weight", None), Tensor):
            raise ConfigError(
                f"SpectralConv1D: expected transformers' Conv1D, got {type(conv1d).__name__} without nf and weight."
                " Use SpectralLinear for nn.Linear."
            )
        targets = {"density": sparsity, "bits": bits, "max_error": max_error}
        weight = compressed(cast(Tensor, conv1d.weight).T, targets, Basis(transform, tile), resident)
        return cls(weight, cast("Tensor | None", conv1d.bias), transposed=True)

    @classmethod
    def from_quantized(
        cls, spectra: Spectra, bias: Tensor | None = None, resident: str = "int8", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Make a layer of the spectrum of V [I, O], or of spectra of consecutive row ranges of it.

        Args:
            bias: [O].
            dtype: floating type that the weight counts as.

        Raises:
            ConfigError: when the codes do not fit the resident form.
            ShapeError: when shapes do not fit each other.
        """
        return cls.from_weight(SpectralWeight.from_spectra(spectra, resident, dtype), bias)

    @classmethod
    def from_weight(cls, weight: SpectralWeight, bias: Tensor | None = None) -> Self:
        """Make a layer of V [I, O] as checkpoints hold it; its codes are laid out as Vᵀ where they can be.

        Args:
            bias: [O].

        Raises:
            ShapeError: when the bias is not [O].
        """
        form, *others = weight.forms
        turned = transposed_form(form) if isinstance(form, LevelForm) and not others else None
        if turned is None:
            return cls(weight, bias)
        return cls(SpectralWeight([turned], weight.resident, weight.dtype), bias, transposed=True)

    @property
    def weight(self) -> Tensor:
        """A dense copy of V [I, O], decompressed anew on every use: writing into it changes nothing."""
        dense = self.spectrum.to_dense()
        return dense.T if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] floating to [..., O] in its dtype (under autocast: in the autocast dtype).

        Raises:
            ShapeError: when the width of x is not I.
            ConfigError: when x is not floating.
        """
        matmul = self.spectrum.matmul if self.transposed else self.spectrum.matmul_transposed
        return matmul(autocast_input(x), self.bias)

    def to_dense(self) -> nn.Linear:
        """A linear layer of the same function, with the decompressed weight."""
        return dense_linear(self.weight.T.contiguous(), self.bias)

    def extra_repr(self) -> str:
        """Sizes and cost."""
        return f"nx={self.nx}, nf={self.nf}, bits_per_weight={self.spectrum.bits_per_weight:.3g}"
