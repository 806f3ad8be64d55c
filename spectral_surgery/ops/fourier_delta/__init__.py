"""y = x ΔWᵀ for ΔW = scaling * Re ifft2(sparse real spectrum)."""

from __future__ import annotations

from spectral_surgery.ops.fourier_delta.reference import delta_weight, fourier_delta

__all__ = ["delta_weight", "fourier_delta"]
