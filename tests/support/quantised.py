"""Small checkpoints that other tools have quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn


def write(folder: Path, tensors: dict[str, Tensor], settings: object, config: dict[str, Any] | None = None) -> Path:
    """A folder with these tensors, in two shards if there are several, and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    body = {"model_type": "llama", **(config or {}), "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix as FP8, and the scales of its blocks: [O, I] and [O / tall, I / wide], rounded up."""
    height, width = weight.shape
    tall, wide = block
    grid = torch.empty(-(-height // tall), -(-width // wide))
    made = torch.empty(height, width, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
            grid[i, j] = weight[part].abs().max() / LARGEST
            made[part] = (weight[part] / grid[i, j]).to(torch.float8_e4m3fn)
    return made, grid


def plain(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """What FP8 numbers and their scales stand for, element by element: the definition."""
    made = torch.empty(values.shape, dtype=torch.bfloat16)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            made[i, j] = (values[i, j].float() * scales[i // block[0], j // block[1]].float()).bfloat16()
    return made


FP8_SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


def quantise_fp8(folder: Path, out: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """A plain folder of transformers with all matrices of its layers as FP8, as DeepSeek-V3 is published."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "layers" in name and tensor.ndim == 2:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensor.float(), block)
        else:
            tensors[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    return write(out, tensors, FP8_SETTINGS | {"weight_block_size": list(block)}, config)
