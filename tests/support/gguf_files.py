"""Small GGUF files with random numbers, for architectures that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS, WORDS, EXPERTS = 64, 96, 4, 2, 2, 40, 4
EXPERT = 768  # as Qwen3-30B-A3B: transformers 5.24 reads no other width of qwen3moe


def write_gguf(file: Path, architecture: str, kind: str = "Q8_0", *, tokenizer: bool = False) -> Path:
    """A llama, qwen2, gemma2, gpt2 or qwen3moe whose matrices are of a kind of GGUF."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    if architecture == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(EXPERT)
    if tokenizer:
        _add_tokenizer(writer, gguf)
    for name, shape in _shapes(architecture):
        values = rng.standard_normal(shape).astype(np.float32) * (0.1 if len(shape) > 1 else 1.0)
        number = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _shapes(architecture: str) -> list[tuple[str, tuple[int, ...]]]:
    size = HIDDEN // HEADS
    found: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (WORDS, HIDDEN)),
        ("output_norm.weight", (HIDDEN,)),
    ]
    if architecture != "gemma2":
        found.append(("output.weight", (WORDS, HIDDEN)))
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * size, HIDDEN),
            "attn_k.weight": (KEY_HEADS * size, HIDDEN),
            "attn_v.weight": (KEY_HEADS * size, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * size),
        }
        if architecture == "qwen3moe":
            block |= {
                "attn_q_norm.weight": (size,),
                "attn_k_norm.weight": (size,),
                "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
                "ffn_gate_exps.weight": (EXPERTS, EXPERT, HIDDEN),
                "ffn_up_exps.weight": (EXPERTS, EXPERT, HIDDEN),
                "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT),
            }
        else:
            block |= {
                "ffn_gate.weight": (INNER, HIDDEN),
                "ffn_up.weight": (INNER, HIDDEN),
                "ffn_down.weight": (HIDDEN, INNER),
            }
        if architecture == "qwen2":
            block |= {f"attn_{x}.bias": block[f"attn_{x}.weight"][:1] for x in "qkv"}
        if architecture == "gemma2":
            block |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
        found += [(f"blk.{layer}.{name}", shape) for name, shape in block.items()]
    return found


def _add_tokenizer(writer: Any, gguf: Any) -> None:
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(20)),
        *("▁" + c for c in "abcdefghijklmnopq"),
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 20]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(words) - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
