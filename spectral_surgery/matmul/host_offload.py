"""Levels that stay in host memory and cross the bus as they are, half a byte or one byte a weight, at every product."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import ConfigError
from spectral_surgery.matmul.transfers import BUFFER_BYTES, bus


@dataclass(frozen=True)
class HostMatrix:
    """A matrix that no layer moves to its device; pinned where there is a GPU.

    Attributes:
        codes: [O, n] int8.
    """

    codes: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> HostMatrix:
        """Bring codes to where copies to a GPU start from. Raises ConfigError when a row is larger than a buffer."""
        width, codes = codes.shape[1], codes.cpu()
        if width > BUFFER_BYTES:
            raise ConfigError(f"resident 'streamed': a row of {width} bytes; expected up to {BUFFER_BYTES}. Use int8.")
        return cls(codes.pin_memory() if torch.cuda.is_available() else codes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also those in other processes, are pinned as this is."""
        return HostMatrix.of, (self.codes,)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self.codes.nbytes

    def blocks(self, device: torch.device) -> closing[Generator[tuple[int, Tensor]]]:
        """First row, and rows from there on, block by block on a device; see `transfers.Bus.blocks`."""
        return closing(bus(device).blocks(self.codes, BUFFER_BYTES // self.codes.shape[1]))
