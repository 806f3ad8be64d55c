"""Y = x Wᵀ for a few tokens with frames as they are stored: each is decoded, and multiplied while it is in a cache.

It is apart from `few_tokens`, since what no other form needs takes seconds to compile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from spectral_surgery.kernels.compile import c_function
from spectral_surgery.kernels.few_tokens import ROWS, SOME, multiply_tile, tile_room
from spectral_surgery.kernels.frames import CODES, decode, to_levels
from spectral_surgery.kernels.matrix import JOB
from spectral_surgery.kernels.threads import next_task, pointer_to


@c_function
def multiply_frames(pointer: Any) -> None:
    """As `few_tokens.multiply`; a task is a frame. ``finite`` is 0 afterwards where int8 does not hold the levels."""
    job = carray(pointer, (1,), JOB)[0]
    columns, frames = job.columns, job.frames
    ends = carray(pointer_to(job.ends), (frames + 1,), np.int64)
    starts = carray(pointer_to(job.starts), (frames + 1,), np.int64)
    room, aside = np.empty(tile_room(job), np.float32), ROWS * columns  # rows before and after, which `dots` may see
    memory = np.zeros(2 * aside + job.most_rows * columns, np.int8)
    while job.finite:
        frame = next_task(pointer)
        if frame >= frames:
            return
        start, stop = starts[frame], starts[frame + 1]
        codes = memory[aside : aside + (stop - start) * columns]
        decoded = decode(job.data + ends[frame], ends[frame + 1] - ends[frame], codes.reshape(stop - start, columns))
        if decoded != CODES or not to_levels(codes, job.parts, job.shift):
            job.finite = 0
            return
        levels = codes.ctypes.data - start * columns
        for first in range(start, stop, job.row_tile):
            for token in range(0, job.tokens, SOME):
                multiply_tile(job, levels, first, min(first + job.row_tile, stop), token, room)
