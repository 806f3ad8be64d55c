"""Orthonormal real transforms of the last dimension, and their use tile by tile (`tiles`).

Orthonormal and real means that Parseval holds: what a compression drops or rounds in the spectrum
is its error in space, known before anything is decoded.
"""

from __future__ import annotations

from spectral_surgery.registry import Table
from spectral_surgery.transforms.base import Transform
from spectral_surgery.transforms.dct import DCT
from spectral_surgery.transforms.haar import HAAR
from spectral_surgery.transforms.hadamard import HADAMARD
from spectral_surgery.transforms.hartley import HARTLEY
from spectral_surgery.transforms.identity import IDENTITY

TRANSFORMS = Table("transform", (DCT, HARTLEY, HADAMARD, HAAR, IDENTITY))

__all__ = ["DCT", "HAAR", "HADAMARD", "HARTLEY", "IDENTITY", "TRANSFORMS", "Transform"]
