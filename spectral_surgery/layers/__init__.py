"""Drop-in layers whose weight is a spectrum in memory, never a dense matrix."""

from __future__ import annotations

from spectral_surgery.layers.conv1d import SpectralConv1D
from spectral_surgery.layers.embedding import SpectralEmbedding
from spectral_surgery.layers.experts import SpectralExperts
from spectral_surgery.layers.linear import SpectralLinear
from spectral_surgery.layers.weight import SpectralWeight

__all__ = ["SpectralConv1D", "SpectralEmbedding", "SpectralExperts", "SpectralLinear", "SpectralWeight"]
