"""What codes cannot be stored in less than."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def entropy(codes: npt.NDArray[Any]) -> float:
    """Order-0 entropy of integers, in bits each."""
    p = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(p * np.log2(p)).sum())
