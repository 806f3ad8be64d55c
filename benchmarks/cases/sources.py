"""Sources that are quantised already, and those with very many tensors."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.case import Inputs, Row, require
from benchmarks.many_tensors import CONFIG, deepseek_v3, write_sparse
from benchmarks.weights import linear_weights
from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor

SECONDS, MEMORY, RATIO = 12.0, 1e9, 1.5
SHARDS = 158
_BLOCK, _LARGEST = 128, 448.0
_FULL, _QUICK = 40_000, 400  # small tensors; as many bytes are in a hundredth of them


@dataclass(frozen=True)
class _Ran:
    seconds: float
    processor_seconds: float
    peak_bytes: int


def run_fp8(quick: bool) -> list[Row]:
    """all-MiniLM-L6-v2 in FP8 blocks: the error of compressing it, beside that of the bfloat16 which it stands for."""
    weights = dict(list(linear_weights().items())[: 6 if quick else None])
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stored[name], stored[f"{name}_scale_inv"] = _blocks(weight)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = _folder(scratch / "fp8", stored, CONFIG["quantization_config"])
        plain = {key: read_tensor(info) for key, info in read_index(source).tensors.items()}
        dense = _folder(scratch / "dense", plain, None)
        rows = []
        for bits in (3.0, 4.0):
            options = CompressOptions(Target("bits", bits))
            reports = [compress(s, scratch / f"{s.name}-{bits}", options).manifest.report for s in (source, dense)]
            require(reports[0].weights == reports[1].weights, "not the same weights are compressed")
            rows.append(
                {
                    "bits": bits,
                    "error of fp8 source": reports[0].relative_error,
                    "error of bfloat16": reports[1].relative_error,
                    "error of fp8 itself": _error(plain, weights),
                    "target": "equal",
                    "met": reports[0].relative_error == reports[1].relative_error,
                }
            )
        return rows


def run_many(inputs: Inputs) -> list[Row]:
    """Headers of a DeepSeek-V3, and small tensors beside the same bytes in a hundredth of their number."""
    with tempfile.TemporaryDirectory(dir=inputs.scratch) as name:
        return [*_headers(Path(name)), *_small(Path(name), _QUICK if inputs.quick else _FULL)]


def _headers(scratch: Path) -> list[Row]:
    tensors = list(deepseek_v3())
    write_sparse(scratch / "v3", tensors, CONFIG, SHARDS)
    rows = []
    for what, more in (("inspect", ()), ("compress", ("out", "--bits", "4", "--dry-run"))):
        ran = _ran(what, scratch / "v3", *more)
        rows.append(
            {
                "what": f"{what} of {len(tensors):,} headers",
                "seconds": ran.seconds,
                "processor seconds": ran.processor_seconds,
                "peak MB": ran.peak_bytes / 1e6,
                "target": f"<= {SECONDS:g} s, {MEMORY / 1e9:g} GB",
                "met": ran.seconds <= SECONDS and ran.peak_bytes <= MEMORY,
            }
        )
    return rows


def _small(scratch: Path, count: int) -> list[Row]:
    rows = []
    for shape in ((64, 128), (256, 512)):
        number = count * 64 * 128 // (shape[0] * shape[1])
        sources = {}
        for kind, tensors, height in (("many", number, shape[0]), ("few", number // 100, 100 * shape[0])):
            sources[kind] = _experts(scratch / f"{kind}-{shape[0]}", max(tensors, 1), (height, shape[1]))
        for what in ("compress", "decompress"):
            times = {}
            for kind, source in sources.items():
                out = source.with_name(f"{source.name}-{what}")
                options = ("--bits", "4", "--threads", "1") if what == "compress" else ()
                given = source if what == "compress" else source.with_name(f"{source.name}-compress")
                times[kind] = _ran(what, given, out, "--quiet", *options)
            ratio = times["many"].processor_seconds / times["few"].processor_seconds
            extra = times["many"].peak_bytes - times["few"].peak_bytes
            rows.append(
                {
                    "what": f"{what} {number:,} of {shape[0]} x {shape[1]}",
                    "seconds": times["many"].seconds,
                    "processor seconds": times["many"].processor_seconds,
                    "peak MB": times["many"].peak_bytes / 1e6,
                    "processor seconds, a hundredth of the tensors": times["few"].processor_seconds,
                    "target": f"<= {RATIO} x, 300 MB more",
                    "met": ratio <= RATIO and extra <= 300e6,
                }
            )
    return rows


def _experts(folder: Path, count: int, shape: tuple[int, int]) -> Path:
    """So many random tensors of experts, in eight files at most."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shards = min(8, count)
    for shard in range(shards):
        names = [f"model.layers.{n // 768}.mlp.experts.{n % 768}.w.weight" for n in range(shard, count, shards)]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: torch.randn(shape, generator=generator).bfloat16() for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _ran(*arguments: object) -> _Ran:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "spectral_surgery", *map(str, arguments)]
    started = time.perf_counter()
    with Path(os.devnull).open("w") as nothing:
        actions = [(os.POSIX_SPAWN_DUP2, nothing.fileno(), 1)]
        process = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    require(os.waitstatus_to_exitcode(status) == 0, f"{' '.join(command[2:5])} failed")
    return _Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers and the scales of their blocks, as DeepSeek-V3 has them."""
    height, width = weight.shape
    padded = torch.zeros(-(-height // _BLOCK) * _BLOCK, -(-width // _BLOCK) * _BLOCK)
    padded[:height, :width] = weight
    blocks = padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) / _LARGEST
    values = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:height, :width]
    return values.to(torch.float8_e4m3fn).contiguous(), scales


def _folder(folder: Path, tensors: dict[str, Tensor], settings: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    body = {"model_type": "bert"} | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def _error(plain: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    lost = sum(float((plain[name].float() - weight).square().sum()) for name, weight in weights.items())
    return math.sqrt(lost / sum(float(weight.square().sum()) for weight in weights.values()))
