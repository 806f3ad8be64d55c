"""Codes to frames, with a check that each decodes to what was encoded.

Whoever makes codes stores them by this, so that all of them get the same bytes for the same codes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec.encoded import frame_spans, rows_per_frame
from spectral_surgery.codec.frame_bytes import decode_frame, encode_frame
from spectral_surgery.codec.parallel import parallel_map
from spectral_surgery.errors import CheckpointError


def encode_rows(codes: Tensor, tile: int, *, threads: int = 1, verify: bool = True) -> tuple[int, tuple[bytes, ...]]:
    """The frames of a matrix of codes.

    Args:
        codes: [O, I] integers, on the CPU.
        threads: frames worked on at once; the result does not depend on it.
        verify: decode each frame to be sure of it; what is only measured need not be.

    Raises:
        CheckpointError: when a frame does not decode to its codes.
    """
    height = rows_per_frame(codes.shape[1], tile)
    rows = [codes[start:stop] for start, stop in frame_spans(len(codes), height)]
    parts = [part.to(narrowest(part)) for part in rows]
    encode = checked_frame if verify else frame_of
    return height, tuple(parallel_map(encode, parts, threads))


def narrowest(codes: Tensor) -> torch.dtype:
    """The narrowest of int8, int16 and int32 that holds all codes."""
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    largest = max(-low, high)
    return next(dtype for dtype in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(dtype).max)


def checked_frame(codes: Tensor) -> bytes:
    """Encode the codes of a frame, [r, I] int8, int16 or int32, and decode them again to be sure.

    Raises CheckpointError when they do not come back.
    """
    data = frame_of(codes)
    check(data, codes)
    return data


def frame_of(codes: Tensor) -> bytes:
    """Encode the codes of a frame, [r, I] int8, int16 or int32; see `check`."""
    return encode_frame(codes.numpy())


def check(data: bytes | memoryview, codes: Tensor) -> None:
    """Raise CheckpointError when a frame does not decode to its codes, [r, I]."""
    rows, columns = codes.shape
    if not np.array_equal(decode_frame(data, (rows, columns)), codes.numpy()):
        raise CheckpointError("encode: a frame does not decode to what was encoded. This is a bug: please report it.")
