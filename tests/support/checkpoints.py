"""Small checkpoints for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def llama_like(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Embedding, a tied head, two linears, a norm and an integer buffer."""
    embedding = gaussian(300, 96, seed=1, dtype=dtype)
    return {
        "lm_head.weight": embedding.clone(),
        "model.embed_tokens.weight": embedding,
        "model.layers.0.mlp.down_proj.weight": gaussian(96, 200, seed=2, dtype=dtype),
        "model.layers.0.self_attn.q_proj.weight": gaussian(130, 96, seed=3, dtype=dtype),
        "model.layers.0.input_layernorm.weight": torch.ones(96, dtype=dtype),
        "model.steps": torch.arange(7),
    }


def write_folder(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    shards: int = 1,
    config: dict | None = None,
    order: list[str] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    names = order or sorted(tensors)
    if shards == 1:
        save_file({n: tensors[n].contiguous() for n in names}, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: tensors[n].contiguous() for n in names[i::shards]}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names[i::shards], file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_bytes(b'{"tokens": "\xc3\xa9"}')
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
