"""An embedding whose table stays a spectrum; a row is decoded when it is looked up."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encoded import Basis
from spectral_surgery.errors import ConfigError
from spectral_surgery.layers.weight import Spectra, SpectralWeight, compressed


class SpectralEmbedding(nn.Module):
    """Drop-in for nn.Embedding.

    Attributes:
        num_embeddings: rows of the table, O.
        embedding_dim: I.
        padding_idx: kept for callers that ask; the table is not trained.
        spectrum: the table; a tied output layer shares it.
    """

    def __init__(self, spectrum: SpectralWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = spectrum.shape
        self.padding_idx = padding_idx
        self.spectrum = spectrum

    @classmethod
    def from_dense(
        cls,
        embedding: nn.Embedding,
        *,
        sparsity: float | None = None,
        bits: float | None = None,
        max_error: float | None = None,
        transform: str = "dct",
        tile: int = 64,
        resident: str = "int8",
    ) -> Self:
        """Compress an embedding, which is not changed; settings as of `SpectralLinear.from_dense`.

        It is transformed along its features only, so that a row decodes alone. Raises ConfigError for max_norm, none or
        several targets, or codes that do not fit the resident form.
        """
        if embedding.max_norm is not None:
            raise ConfigError(
                f"SpectralEmbedding: expected max_norm None, got {embedding.max_norm:g}, which rescales the table"
                " while it is used. Leave this embedding as it is."
            )
        targets = {"density": sparsity, "bits": bits, "max_error": max_error}
        weight = compressed(embedding.weight, targets, Basis(transform, tile, (1,)), resident)
        return cls(weight, embedding.padding_idx)

    @classmethod
    def from_quantized(
        cls,
        spectra: Spectra,
        padding_idx: int | None = None,
        resident: str = "int8",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Make an embedding of a spectrum, or of spectra of consecutive row ranges: codes, or stored frames.

        Args:
            dtype: floating type of the output.

        Raises:
            ConfigError: when the codes do not fit the resident form.
            ShapeError: when shapes do not fit each other.
        """
        return cls(SpectralWeight.from_spectra(spectra, resident, dtype), padding_idx)

    @property
    def weight(self) -> Tensor:
        """A dense copy of the table, decompressed anew on every use: writing into it changes nothing."""
        return self.spectrum.to_dense()

    def forward(self, ids: Tensor) -> Tensor:
        """[...] integers to [..., I] in the dtype of the table.

        Raises ShapeError when an id is not a row of the table.
        """
        return self.spectrum.rows(ids).to(self.spectrum.dtype)

    def to_dense(self) -> nn.Embedding:
        """The same embedding with the decompressed table."""
        weight = nn.Parameter(self.spectrum.to_dense())
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight)

    def extra_repr(self) -> str:
        """Sizes and cost."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, bits_per_weight={self.spectrum.bits_per_weight:.3g}"
        )
