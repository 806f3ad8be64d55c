"""Kinds of processors, and the arithmetic of those that this one is not."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from spectral_surgery.matmul.dispatch import Processor

PROCESSORS = [Processor(int8, bfloat16) for int8 in (False, True) for bfloat16 in (False, True)]
PROCESSORS.append(Processor(True, True, tiles=True))


def exact_int_mm(left: Tensor, right: Tensor) -> Tensor:
    """What torch._int_mm is: [T, K] int8 times [K, N] int8 to [T, N] int32."""
    return (left.double() @ right.double()).to(torch.int32)


@cache
def int8_saturates() -> bool:
    """Whether this processor adds up products of int8 in 16 bits."""
    left, right = torch.full((8, 64), 127, dtype=torch.int8), torch.full((64, 8), -128, dtype=torch.int8)
    return not torch.equal(torch._int_mm(left, right), exact_int_mm(left, right))
