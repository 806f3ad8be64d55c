"""Codes to frames: the layout of each, and a check that it decodes to what was encoded.

Whoever makes codes stores them by this, so that all of them get the same bytes for the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from spectral_surgery.codec.encoded import frame_spans, rows_per_frame
from spectral_surgery.codec.frame_bytes import Layout, choose_layout, decode_frame, encode_frame
from spectral_surgery.codec.parallel import one_torch_thread, parallel_map
from spectral_surgery.errors import CheckpointError

_TRIED = 1 << 16  # codes that layouts are tried on, in whole tiles
_SAME_SCALE = 0.5  # of log2 of the mean square


def choose_layouts(powers: Sequence[float], codes: Callable[[int], Tensor]) -> list[Layout]:
    """One layout for all frames of about the same scale, tried on the first of them.

    One for all frames would miss the rate where rows differ: small codes in bytes that are wide enough for large ones.
    Returns the layout of each frame.

    Args:
        powers: mean square of each frame, in any unit.
        codes: [r, k] integers of a frame that layouts are tried on, by the number of the frame; see `middle`.
    """
    found: dict[int | None, Layout] = {}
    layouts = []
    for number, power in enumerate(powers):
        scale = round(math.log2(power) / _SAME_SCALE) if power else None
        if scale not in found:
            found[scale] = choose_layout(codes(number).reshape(-1).numpy())
        layouts.append(found[scale])
    return layouts


def middle(rows: Tensor, tile: int) -> Tensor:
    """The tiles in the middle of a frame, [r, I] to [r, k]: enough to try layouts on."""
    columns = rows.shape[1]
    width = tile * -(-_TRIED // (len(rows) * tile))
    start = max(columns - width, 0) // 2 // tile * tile
    return rows[:, start : start + width].contiguous()


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
    dtype = narrowest(codes)
    parts = [codes[start:stop].to(dtype) for start, stop in frame_spans(len(codes), height)]
    with one_torch_thread():
        powers = [float(part.double().square().mean()) for part in parts]
        layouts = choose_layouts(powers, lambda number: middle(parts[number], tile))
        pairs = list(zip(parts, layouts, strict=True))
        encode = checked_frame if verify else _frame
        return height, tuple(parallel_map(lambda pair: encode(*pair), pairs, threads))


def narrowest(codes: Tensor) -> torch.dtype:
    """The narrowest of int8, int16 and int32 that holds all codes."""
    low, high = (int(v) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    largest = max(-low, high)
    return next(dtype for dtype in (torch.int8, torch.int16, torch.int32) if largest <= torch.iinfo(dtype).max)


def checked_frame(codes: Tensor, layout: Layout) -> bytes:
    """Encode the codes of a frame, [r, I] int8, int16 or int32, and decode them again to be sure.

    Raises CheckpointError when they do not come back.
    """
    data, flat = _frame(codes, layout), codes.reshape(-1).numpy()
    if not np.array_equal(decode_frame(data, flat.size), flat):
        raise CheckpointError("encode: a frame does not decode to what was encoded. This is a bug: please report it.")
    return data


def _frame(codes: Tensor, layout: Layout) -> bytes:
    return encode_frame(codes.reshape(-1).numpy(), layout)
