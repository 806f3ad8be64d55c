"""A random language model as llama.cpp reads it, written with the package gguf: the same weights in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.language_model import EPSILON, POSITIONS, Size
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.load_errors import required

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, size: Size, out: Path) -> Path:
    """Write a model in Llama's layout as one GGUF file: matrices in bfloat16, the others in float32.

    Args:
        folder: of the model, plain, as `write_model` writes it.
        size: of it.
        out: file to be written.

    Raises:
        BackendError: when gguf is not installed.
    """
    gguf: Any = required("gguf", "write GGUF files")
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.inner)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.key_heads or size.heads)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(size.hidden // size.heads)
    writer.add_vocab_size(size.words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{n}" for n in range(size.words)])
    writer.add_token_scores([0.0] * size.words)
    writer.add_token_types([gguf.TokenType.NORMAL] * size.words)
    for name, info in read_index(folder).tensors.items():
        weight = _reordered(name, read_tensor(info), size)
        if weight.ndim == 1:
            writer.add_tensor(_there(name), weight.float().numpy())
        else:
            raw = weight.to(torch.bfloat16).view(torch.uint16).numpy()
            writer.add_tensor(_there(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _there(name: str) -> str:
    """The name that llama.cpp has for a tensor."""
    before, _, rest = name.removesuffix(".weight").rpartition("layers.")
    layer, _, part = rest.partition(".") if before else ("", "", rest)
    return f"blk.{layer}.{_NAMES[part]}.weight" if before else f"{_NAMES[part]}.weight"


def _reordered(name: str, weight: Tensor, size: Size) -> Tensor:
    """Rows of queries and keys as llama.cpp turns them: the two numbers of a pair beside each other."""
    heads = {"q_proj.weight": size.heads, "k_proj.weight": size.key_heads or size.heads}
    for end, count in heads.items():
        if name.endswith(end):
            return weight.reshape(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight
