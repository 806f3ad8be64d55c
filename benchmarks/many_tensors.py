"""Checkpoints with very many tensors: the headers of a DeepSeek-V3, and small experts with numbers in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from spectral_surgery.files.header import DTYPE_BITS

BLOCK = 128
HIDDEN, LAYERS, DENSE_LAYERS, EXPERTS = 7168, 61, 3, 256
Sizes = tuple[str, tuple[int, ...]]  # dtype and shape

CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "n_routed_experts": EXPERTS,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    },
}


def deepseek_v3() -> Iterator[tuple[str, Sizes]]:
    """Names, dtypes and shapes of DeepSeek-V3 without the layer that predicts a second token, as it is published."""
    yield "model.embed_tokens.weight", ("BF16", (129280, HIDDEN))
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        yield from _fp8(f"{at}.self_attn.q_a_proj", 1536, HIDDEN)
        yield from _fp8(f"{at}.self_attn.q_b_proj", 24576, 1536)
        yield from _fp8(f"{at}.self_attn.kv_a_proj_with_mqa", 576, HIDDEN)
        yield from _fp8(f"{at}.self_attn.kv_b_proj", 32768, 512)
        yield from _fp8(f"{at}.self_attn.o_proj", HIDDEN, 16384)
        for name, size in (("q_a", 1536), ("kv_a", 512)):
            yield f"{at}.self_attn.{name}_layernorm.weight", ("BF16", (size,))
        for name in ("input", "post_attention"):
            yield f"{at}.{name}_layernorm.weight", ("BF16", (HIDDEN,))
        if layer < DENSE_LAYERS:
            yield from _mlp(f"{at}.mlp", 18432)
            continue
        yield f"{at}.mlp.gate.weight", ("BF16", (EXPERTS, HIDDEN))
        yield f"{at}.mlp.gate.e_score_correction_bias", ("F32", (EXPERTS,))
        for expert in ("shared_experts", *(f"experts.{number}" for number in range(EXPERTS))):
            yield from _mlp(f"{at}.mlp.{expert}", 2048)
    yield "model.norm.weight", ("BF16", (HIDDEN,))
    yield "lm_head.weight", ("BF16", (129280, HIDDEN))


def _mlp(at: str, width: int) -> Iterator[tuple[str, Sizes]]:
    yield from _fp8(f"{at}.gate_proj", width, HIDDEN)
    yield from _fp8(f"{at}.up_proj", width, HIDDEN)
    yield from _fp8(f"{at}.down_proj", HIDDEN, width)


def _fp8(at: str, rows: int, columns: int) -> Iterator[tuple[str, Sizes]]:
    yield f"{at}.weight", ("F8_E4M3", (rows, columns))
    yield f"{at}.weight_scale_inv", ("F32", (-(-rows // BLOCK), -(-columns // BLOCK)))


def write_sparse(folder: Path, tensors: list[tuple[str, Sizes]], config: dict[str, object], shards: int) -> None:
    """A checkpoint of true headers and of holes where its numbers would be: it takes no room on the disk."""
    folder.mkdir(parents=True)
    weight_map = {}
    each = -(-len(tensors) // shards)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors[shard * each : (shard + 1) * each]:
            start, end = end, end + torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
