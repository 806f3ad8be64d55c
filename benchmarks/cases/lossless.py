"""Weights of a real model coded without loss: bytes, and how fast they come back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Row, require
from benchmarks.timing import interleaved
from benchmarks.weights import checkpoint_folder
from spectral_surgery.codec.byte_planes import centres_of, decode_planes, encode_planes, layout_of, split
from spectral_surgery.codec.parallel import parallel_map
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor

MOST = {torch.bfloat16: 0.69, torch.float16: 0.88, torch.float32: 0.85, torch.float8_e4m3fn: None}
FASTEST = 0.15  # of a copy
_ROUNDS = 9


def run(quick: bool) -> list[Row]:
    """All matrices of all-MiniLM-L6-v2 in float32, and cast to narrower numbers; FP8 with a scale for all."""
    infos = [info for info in read_index(checkpoint_folder()).tensors.values() if len(info.shape) == 2]
    weights = torch.cat([read_tensor(info).flatten() for info in infos[: 4 if quick else None]])
    return [coded(weights, dtype) for dtype in MOST]


def coded(weights: Tensor, dtype: torch.dtype) -> Row:
    """Bytes of the numbers, and the time to decode them over that of copying them, on as many threads."""
    values = weights * (448 / weights.abs().max()) if dtype.itemsize == 1 else weights
    values = values.to(dtype)
    numbers, threads = values.view(torch.uint8).numpy().view(f"u{dtype.itemsize}"), torch.get_num_threads()
    layout = layout_of(dtype.itemsize, len(numbers), turned=True)
    centres = centres_of(split(numbers, turned=True))
    spans = [slice(start, start + layout.per_frame) for start in range(0, len(numbers), layout.per_frame)]
    frames = [encode_planes(numbers[span], layout, centres) for span in spans]
    out, copy = np.empty_like(numbers), torch.empty_like(values)

    def one(number: int) -> None:
        span = out[spans[number]]
        decode_planes(frames[number], layout, centres, len(span), span)

    def decode() -> None:
        parallel_map(one, range(len(frames)), threads)

    timings = interleaved({"decode": decode, "copy": lambda: copy.copy_(values)}, _ROUNDS)
    require(np.array_equal(out, numbers), f"{dtype}: other bits came back")
    stored = sum(len(piece) for frame in frames for piece in frame)
    ratio, speed = stored / numbers.nbytes, timings["copy"].median / timings["decode"].median
    most = MOST[dtype]
    aim = {"target": f"<= {most}, >= {FASTEST}", "met": ratio <= most and speed >= FASTEST} if most else {}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes over original": ratio,
        "decode, GB/s": numbers.nbytes / timings["decode"].median / 1e9,
        "copy, GB/s": numbers.nbytes / timings["copy"].median / 1e9,
        "decode over copy": speed,
        "threads": threads,
        **aim,
    }
