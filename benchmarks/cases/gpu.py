"""Compressed layers on a GPU, and from host memory to one, beside dense bfloat16."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.case import Row
from benchmarks.cases.spectral_matmul import TOKENS, Layer, check, weight_of
from benchmarks.timing import interleaved
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.rate import Target

STREAMED = 3.0  # times the speed of copying the bfloat16 weight
_FORMS = (("int8", 4.0), ("int12", 8.0), ("int5", 3.0), ("int4", 2.0))
_NONE: list[Row] = [{"skipped": "no CUDA device", "reason": "expected one, got none; `gpu_static` needs no GPU"}]
_OFFLOADED = "bfloat16"
_REPEATS = 20


def run_products(quick: bool) -> list[Row]:
    """Layers that are on the GPU; a row that says so where there is no GPU."""
    with torch.inference_mode():
        return on_device(512 if quick else 4096, torch.device("cuda")) if torch.cuda.is_available() else _NONE


def run_streaming(quick: bool) -> list[Row]:
    """Layers whose levels stay in host memory; a row that says so where there is no GPU."""
    with torch.inference_mode():
        return streaming(512 if quick else 4096, torch.device("cuda")) if torch.cuda.is_available() else _NONE


def on_device(size: int, device: torch.device) -> list[Row]:
    """The resident forms of a device, which should beat dense bfloat16 at one token."""
    weight = weight_of(size)
    layers: dict[str, nn.Module] = {
        name: check(encode(weight, Target("bits", bits))[0], name, device) for name, bits in _FORMS
    }
    layers["dense bfloat16"] = nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=device)
    rows: list[Row] = []
    for tokens in TOKENS:
        x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).bfloat16().to(device)
        timings = interleaved({name: partial(_repeated, layer, x) for name, layer in layers.items()}, 10)
        base = timings["dense bfloat16"].median
        rows += [
            {
                "device": device.type,
                "tokens": tokens,
                "layer": name,
                "ms": 1e3 * timing.median / _REPEATS,
                "time / bfloat16": timing.median / base,
                "target": "< 1" if tokens == 1 and name != "dense bfloat16" else "",
                "met": timing.median < base if tokens == 1 and name != "dense bfloat16" else "",
            }
            for name, timing in timings.items()
        ]
    return rows


def streaming(size: int, device: torch.device) -> list[Row]:
    """Layers whose weights stay in host memory, beside one whose bfloat16 weight is copied for every product."""
    weight = weight_of(size)
    layers: dict[str, Layer] = {
        f"streamed, {bits:g} bits stored": check(encode(weight, Target("bits", bits))[0], "streamed", device)
        for bits in (2.0, 4.0)
    }
    held = weight.bfloat16()
    held = held.pin_memory() if device.type == "cuda" else held
    layers[_OFFLOADED] = lambda x: x @ held.to(x.device, non_blocking=True).T
    rows: list[Row] = []
    for tokens in (1, 64):
        x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens)).bfloat16().to(device)
        timings = interleaved({name: partial(_repeated, layer, x) for name, layer in layers.items()}, 10)
        base = timings[_OFFLOADED].median
        for name, timing in timings.items():
            aim = f">= {STREAMED:g}x" if name.startswith("streamed, 2") else ""
            rows.append(
                {
                    "device": device.type,
                    "tokens": tokens,
                    "from host memory": name,
                    "ms": 1e3 * timing.median / _REPEATS,
                    "speed / bfloat16": base / timing.median,
                    "target": aim,
                    "met": base / timing.median >= STREAMED if aim else "",
                }
            )
    return rows


def _repeated(layer: Layer, x: Tensor) -> None:
    """Many calls for one wait: a GPU works on while the next call is prepared."""
    for _ in range(_REPEATS):
        layer(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
